"""Hidden states as 4-bit integers in a rotated space, one bfloat16 scale for every 64 columns: D/2 + D/32 bytes a row, and for 16 rows
or more one row for their mean.

With s = max|y| / 7 of a group of the rotated row y: the root mean square error of a row is at most that of its half steps s / 2 (and
2⁻⁸ of it for the rounding of the scales). See ``rotation``; the layout of a row is ``int4_unrotated``'s.
"""

from __future__ import annotations

import torch

from teacher_cache.codecs import int4_unrotated, rotation

NAME = "int4"
VERSION = 2
WIDE = True


def encode(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """``[R, D]`` → ``int4_unrotated``'s tensors of S rows; S: ``rotation.encode``. Rows of zeros decode to zeros."""
    return rotation.encode(rows, int4_unrotated)


def decode(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 ``[R, D]``."""
    return rotation.decode(stored, int4_unrotated)
