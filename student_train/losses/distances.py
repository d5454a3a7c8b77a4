"""Manhattan distances between the rows of two matrices without ever holding ``[A, B, V]`` (slow twin: ``plain.manhattan``).

In a column where every a of a few rows is at least every b (or none is above any), Σ|a − b| is ±(Σa − Σb): no pair is looked at. Teacher
and student disagree about most tokens as a whole, so most columns of a vocabulary are such, the more the fewer rows are taken at a
time. In the others Σ|a − b| = 2·Σ max(a, b) − Σa − Σb: two passes over a small buffer, where the difference, its absolute value and
their sum are three. Both sides are centred by column first, which moves no difference and leaves the sums small, so little cancels.
"""

from __future__ import annotations

import torch

BUFFER = 1 << 19
"""Floats of the buffer of maxima on a CPU: 2 MiB, which stay in its outer cache (from 16 MiB on it takes twice as long)."""
COLUMNS = 2048
"""Columns, about, summed in float32 before they go to float64: wider blocks lose digits, narrower ones take longer."""

ROWS = 36
"""Rows of the left side taken at a time: neighbouring patches say alike things, and a run of them leaves few columns to look at."""
WORTH = 0.25
"""Share of columns without pairs from which leaving them out is worth copying the others."""


def manhattan(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """float64 ``[A, B]`` of float32 rows ``[A, V]`` and ``[B, V]``; no gradient.

    On a GPU the sums of ``torch.cdist`` over blocks of columns: its kernel writes one number a pair and no maxima.
    """
    total = left.new_zeros(len(left), len(right), dtype=torch.float64)
    if not total.numel():
        return total
    blocks = max(1, round(left.shape[1] / COLUMNS))  # of equal width: a narrow last one costs as much as a wide one
    for some, others in zip(left.tensor_split(blocks, dim=1), right.tensor_split(blocks, dim=1)):
        total += torch.cdist(some, others, p=1.0) if left.is_cuda else _of_columns(some, others)
    return total


def _of_columns(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Distances float64 ``[A, B]`` over one block of columns, on a CPU."""
    middle = right.mean(dim=0)
    left, right = left - middle, right - middle
    least, most = right.amin(dim=0), right.amax(dim=0)  # aminmax is ten times slower on a CPU
    return torch.cat([_of_rows(run, right, least, most) for run in left.split(ROWS)])


def _of_rows(left: torch.Tensor, right: torch.Tensor, least: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """The same for a few rows; least, most: of the right side's columns ``[V]``. NaN is in no order, so its column is looked at."""
    low, high = left.amin(dim=0), left.amax(dim=0)
    above, below = low >= most, high <= least
    apart = above | below
    if apart.to(torch.float32).mean() < WORTH:
        return _by_maxima(left, right)
    sign = above.to(left.dtype) - below.to(left.dtype)
    total = (left @ sign).to(torch.float64)[:, None] - (right @ sign).to(torch.float64)
    crossing = torch.nonzero(~apart).flatten()
    return total + _by_maxima(left[:, crossing], right[:, crossing]) if len(crossing) else total


def _by_maxima(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Distances float64 ``[A, B]`` over some columns, pair by pair."""
    rows = max(1, BUFFER // right.numel())
    buffer = right.new_empty(min(rows, len(left)), *right.shape)
    sums = right.new_empty(len(left), len(right))
    for chunk, out in zip(left.split(rows), sums.split(rows)):
        torch.maximum(chunk[:, None], right, out=buffer[: len(chunk)])
        torch.sum(buffer[: len(chunk)], dim=2, out=out)
    ends = left.sum(dim=1).to(torch.float64)[:, None] + right.sum(dim=1).to(torch.float64)
    return sums.to(torch.float64).mul_(2.0).sub_(ends).clamp_min_(0.0)
