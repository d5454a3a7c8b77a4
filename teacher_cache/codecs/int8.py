"""Hidden states as int8 in a rotated space, one float32 scale a row: D + 4 bytes a row, and for 16 rows or more one row for their mean.

With s = max|y| / 127 of the rotated row y: the root mean square error of a row is at most s / 2, about s / √12. See ``rotation``.
"""

from __future__ import annotations

import torch

from teacher_cache.codecs import int8_unrotated, rotation

NAME = "int8"
VERSION = 2
WIDE = True


def encode(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """``[R, D]`` → ``rows`` int8 ``[S, D]``, ``scale`` float32 ``[S]``; S: ``rotation.encode``. Rows of zeros decode to zeros."""
    return rotation.encode(rows, int8_unrotated)


def decode(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 ``[R, D]``."""
    return rotation.decode(stored, int8_unrotated)
