"""Some columns of the vocabulary, and weights that make a sum over them an unbiased estimate of the sum over all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

FLOOR = 0.1
"""Importance of a column at least, over the mean: bounds the weight of a column whose importance was judged too low."""
_spreads: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_samplers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class ColumnSampler:
    """Draws ``count`` columns, column v with probability π_v ∝ its importance, at most 1 (a column that would exceed it is always there).

    Systematic sampling: the columns lie one after the other as intervals of length π_v, in an order shuffled once, and marks at a
    distance of 1 with a random start fall into them. So ``count`` is exact, no column comes twice, and a draw costs ``count`` searches.

    Attributes:
        chances: π float64 ``[V]``. order: int64 ``[V]``. ends: float64 ``[V]``, where the intervals end.
    """

    count: int
    chances: torch.Tensor
    order: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, importance: torch.Tensor, count: int) -> ColumnSampler:
        """Args: importance: ``[V]`` on the CPU, at least 0 and finite; columns of importance 0 still come, rarely."""
        count = min(count, len(importance))
        chances = inclusion(importance.to(torch.float64), count)
        order = torch.randperm(len(chances), generator=torch.Generator().manual_seed(0))
        ends = chances[order].cumsum(0)
        # The rounding of the sum must not cost or add a column.
        return cls(count, chances, order, ends * (count / ends[-1]))

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """(columns int64 ``[m]`` by rising number, weights float32 ``[m]``): E[Σ weights·f(columns)] = Σ_v f(v)."""
        start = torch.rand((), generator=generator, dtype=torch.float64)
        marks = torch.arange(self.count, dtype=torch.float64) + start
        places = torch.searchsorted(self.ends, marks, right=True).clamp_max(len(self.order) - 1)
        columns = self.order[places].sort().values
        return columns, self.chances[columns].reciprocal().to(torch.float32)


def sampler_of_head(head: torch.Tensor, vocabulary: int, count: int) -> ColumnSampler:
    """Columns by ``column_spread`` over the first ``vocabulary`` rows of a head ``[V, D]``, made once for the same three."""
    made = _samplers.setdefault(head, {})
    if (vocabulary, count) not in made:
        made[vocabulary, count] = ColumnSampler.of(column_spread(head)[:vocabulary], count)
    return made[vocabulary, count]


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
