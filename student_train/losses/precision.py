"""The precision that losses are computed in."""

from __future__ import annotations

import torch


def wide(values: torch.Tensor) -> torch.Tensor:
    """float32 of anything narrower; float64 stays, so that a reference goes through the very same losses."""
    return values if values.dtype == torch.float64 else values.to(torch.float32)
