"""Hidden states as bfloat16: exact for a teacher that runs in bfloat16, 2·D bytes a row."""

from __future__ import annotations

import torch

NAME = "bf16"
VERSION = 1


def encode(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Round ``[R, D]`` to bfloat16 (nearest even)."""
    return {"rows": rows.to(torch.bfloat16).contiguous()}


def decode(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 ``[R, D]``."""
    return stored["rows"].to(torch.float32)
