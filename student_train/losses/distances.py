"""Manhattan distances between the rows of two matrices without ever holding ``[A, B, V]`` (slow twin: ``plain.manhattan``).

Σ|a − b| = 2·Σ max(a, b) − Σa − Σb: two passes over a small buffer, where the difference, its absolute value and their sum are three.
Both sides are centred by column first, which moves no difference and leaves the three sums small, so little cancels.
"""

from __future__ import annotations

import torch

BUFFER = 1 << 19
"""Floats of the buffer of maxima on a CPU: 2 MiB, which stay in its outer cache (from 16 MiB on it takes twice as long)."""
COLUMNS = 2048
"""Columns summed in float32 before they go to float64: wider ones lose digits, narrower ones take longer."""


def manhattan(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """float64 ``[A, B]`` of float32 rows ``[A, V]`` and ``[B, V]``; no gradient.

    On a GPU the sums of ``torch.cdist`` over blocks of columns: its kernel writes one number a pair and no maxima.
    """
    total = left.new_zeros(len(left), len(right), dtype=torch.float64)
    if not total.numel():
        return total
    for some, others in zip(left.split(COLUMNS, dim=1), right.split(COLUMNS, dim=1)):
        total += torch.cdist(some, others, p=1.0) if left.is_cuda else _by_maxima(some, others)
    return total


def _by_maxima(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Distances float64 ``[A, B]`` over one block of columns."""
    middle = right.mean(dim=0)
    left, right = left - middle, right - middle
    rows = max(1, BUFFER // right.numel())
    buffer = right.new_empty(min(rows, len(left)), *right.shape)
    sums = right.new_empty(len(left), len(right))
    for chunk, out in zip(left.split(rows), sums.split(rows)):
        torch.maximum(chunk[:, None], right, out=buffer[: len(chunk)])
        torch.sum(buffer[: len(chunk)], dim=2, out=out)
    ends = left.sum(dim=1).to(torch.float64)[:, None] + right.sum(dim=1).to(torch.float64)
    return sums.to(torch.float64).mul_(2.0).sub_(ends).clamp_min_(0.0)
