"""Version 1 of ``int4``, of the row as it is: 4-bit integers, one bfloat16 scale for every 64 columns, D/2 + D/32 bytes a row.

Written for fields that were begun with it, and the arithmetic of version 2 (``int4.py``), which rotates first.

Symbols are −7 … 7 in steps of max|x| / 7, the largest magnitude of the group rounded to bfloat16 (exact for a teacher that runs in
bfloat16): the error is at most half a step, max|x| / 14, and 2⁻⁸ of that for the rounding. Two values share a byte, the even column
in its low half, as symbol + 8.

Groups, since one scale a row leaves nothing of the others where a few columns are large. On the demo teacher's vision rows (D = 256)
one scale a row gave KL 0.0036 nats at 130 bytes, groups of 64 give 0.0025 at 136; with two columns made 30 and 50 times larger, the
relative error of all others was 0.98 with one scale and 0.59 with groups, two of which were the large columns' own.
"""

from __future__ import annotations

import torch

NAME = "int4"
VERSION = 1
GROUP = 64
LARGEST = 7


def encode(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Symmetric quantisation of ``[R, D]``: ``rows`` uint8 ``[R, D // 2]``, ``largest`` bfloat16 ``[R, ⌈D / 64⌉]``.

    A row of odd width keeps its last symbol by itself, ``odd`` uint8 ``[R, 1]``. Groups of zeros decode to zeros.
    """
    rows = rows.to(torch.float32)
    width = rows.shape[1]
    shape = (len(rows), -(-width // GROUP), GROUP)
    groups = torch.nn.functional.pad(rows, (0, -width % GROUP)).view(shape)
    largest = groups.abs().amax(dim=2).to(torch.bfloat16)
    step = largest.to(torch.float32) / LARGEST
    step = torch.where(step > 0, step, torch.inf)
    symbols = (groups / step[:, :, None]).round().to(torch.int8).add(LARGEST + 1).view(torch.uint8)
    symbols = symbols.flatten(1)[:, :width]
    even = width - width % 2
    stored = {"rows": symbols[:, 0:even:2] | symbols[:, 1:even:2] << 4, "largest": largest}
    return {**stored, "odd": symbols[:, even:]} if width % 2 else stored


def decode(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 ``[R, D]``."""
    pairs = stored["rows"]
    symbols = torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(1)
    if "odd" in stored:
        symbols = torch.cat([symbols, stored["odd"]], dim=1)
    step = stored["largest"].to(torch.float32) / LARGEST
    steps = step.repeat_interleave(GROUP, dim=1)[:, : symbols.shape[1]]
    return (symbols.to(torch.float32) - (LARGEST + 1)) * steps
