"""Hidden states as float32: bit-exact for a float32 teacher, 4·D bytes a row; for truth tests and small caches."""

from __future__ import annotations

import torch

NAME = "fp32"
VERSION = 1


def encode(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Store ``[R, D]`` as it is."""
    return {"rows": rows.to(torch.float32).contiguous()}


def decode(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 ``[R, D]``."""
    return stored["rows"].to(torch.float32)
