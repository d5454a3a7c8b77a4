"""Some columns of the vocabulary, and weights that make a sum over them an unbiased estimate of the sum over all."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

FLOOR = 0.1
"""Importance of a column at least, over the mean: bounds the weight of a column whose importance was judged too low."""
_spreads: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def column_spread(head: torch.Tensor) -> torch.Tensor:
    """‖W_v − mean W‖ of every row of a head ``[V, D]``, float64 ``[V]`` on the CPU: how far logit v moves apart from the others.

    The part of a cost in which all columns agree tells no pair from another. Rows of tokens that no training text had are all alike:
    half the vocabulary of a small world, some of every real one. Made once a head, which must not change (a teacher's).
    """
    if head not in _spreads:
        middle = head.mean(dim=0, dtype=torch.float32)
        norms = [(rows.to(torch.float32) - middle).norm(dim=1) for rows in head.detach().split(8192)]
        _spreads[head] = torch.cat(norms).to("cpu", torch.float64)
    return _spreads[head]


def draw_columns(importance: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(columns int64 ``[m]``, weights float32 ``[m]``): E[Σ weights·f(columns)] = Σ_v f(v), m = ``count`` or V where that is less.

    Column v is drawn with probability π_v ∝ importance, at most 1 (a column that would exceed it is always there), and counts 1/π_v:
    systematic sampling of a random order, so m is exact, no column comes twice, and equal importance is a plain random subset.

    Args:
        importance: ``[V]`` on the CPU, at least 0 and finite; columns of importance 0 still come, rarely. generator: of the CPU.
    """
    if count >= len(importance):
        return torch.arange(len(importance)), torch.ones(len(importance))
    chances = inclusion(importance.to(torch.float64), count)
    order = torch.randperm(len(chances), generator=generator)
    ends = chances[order].cumsum(0)
    ends = ends * (count / ends[-1])  # the rounding of the sum must not cost or add a column
    start = torch.rand((), generator=generator, dtype=torch.float64)
    marks = torch.arange(count, dtype=torch.float64) + start
    columns = order[torch.searchsorted(ends, marks, right=True).clamp_max(len(chances) - 1)].sort().values
    return columns, chances[columns].reciprocal().to(torch.float32)


def inclusion(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Probabilities float64 ``[V]`` of being drawn: sum ``count``, proportional to importance below 1."""
    floor = FLOOR * importance.mean().clamp_min(torch.finfo(torch.float64).tiny)
    scores = importance.clamp_min(floor)
    certain = torch.zeros_like(scores, dtype=torch.bool)
    while True:
        left = count - int(certain.sum())
        chances = torch.where(certain, 1.0, left * scores / scores[~certain].sum())
        above = (chances >= 1.0) & ~certain
        if not above.any():
            return chances
        certain |= above
