"""Manhattan distances between the rows of two matrices without ever holding ``[A, B, V]`` (slow twin: the tests' ``plain_losses``).

In a column where every a is at least every b (or none is above any), Σ|a − b| is ±(Σa − Σb): no pair is looked at. Two models'
logits are so in most columns, the more the fewer rows are taken at a time: what is left is halved by rows and looked at again. In the
last of them Σ|a − b| = 2·Σ max(a, b) − Σa − Σb: two passes over a small buffer, where the difference, its absolute value and their
sum are three. Both sides are centred by column first, which moves no difference and leaves the sums small, so little cancels.
"""

from __future__ import annotations

import torch

BUFFER = 1 << 19
"""Floats of the buffer of maxima on a CPU: 2 MiB, which stay in its outer cache (from 16 MiB on it takes twice as long)."""
COLUMNS = 2048
"""Columns, about, summed in float32 before they go to float64: wider blocks lose digits, narrower ones take longer."""

PAIRS = 1 << 21
"""Pairs of numbers that cost about as much as looking for the columns in which there are none to look at."""
ROWS = 16
"""Rows of the left side that are not halved any more."""


def manhattan(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """float64 ``[A, B]`` of float32 (or float64) rows ``[A, V]`` and ``[B, V]``; no gradient.

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
    kind = torch.promote_types(left.dtype, right.dtype)
    return _by_order((left - middle).to(kind), (right - middle).to(kind))


def _by_order(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The same: by sums where the sides lie apart, by maxima elsewhere. NaN is in no order, so its column is looked at."""
    if len(left) * right.numel() < PAIRS:
        return _by_maxima(left, right)
    # Not aminmax, which is ten times slower over rows.
    above, below = left.amin(dim=0) >= right.amax(dim=0), left.amax(dim=0) <= right.amin(dim=0)
    sign = above.to(left.dtype) - below.to(left.dtype)
    apart = (left @ sign).to(torch.float64)[:, None] - (right @ sign).to(torch.float64)
    crossing = torch.nonzero(~(above | below)).flatten()
    if not len(crossing):
        return apart
    left, right = left[:, crossing], right[:, crossing]
    if len(left) <= ROWS:
        return apart.add_(_by_maxima(left, right))
    return apart.add_(torch.cat([_by_order(half, right) for half in left.chunk(2)]))


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
