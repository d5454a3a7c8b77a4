"""Version 1 of ``int8``, of the row as it is: D + 4 bytes a row, one float32 scale, error at most half a step, max|x| / 254.

Written for fields that were begun with it, and the arithmetic of version 2 (``int8.py``), which rotates first.
"""

from __future__ import annotations

import torch

NAME = "int8"
VERSION = 1


def encode(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Symmetric quantisation of ``[R, D]``; an all-zero row keeps scale 0 and decodes to zeros."""
    rows = rows.to(torch.float32)
    scale = rows.abs().amax(dim=1) / 127.0 if rows.shape[1] else rows.new_zeros(rows.shape[0])
    step = torch.where(scale > 0, scale, torch.ones_like(scale))
    return {"rows": (rows / step[:, None]).round().to(torch.int8), "scale": scale}


def decode(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 ``[R, D]``."""
    return stored["rows"].to(torch.float32) * stored["scale"][:, None]
