"""How the rows of one optimizer step count, over all micro-batches of all processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from student_train.dataset import TrainBatch
from student_train.distributed import Processes
from student_train.losses.counted import Weights, count_rows
from student_train.losses.terms import Terms

Weigh = Callable[[TrainBatch], Weights]
"""micro-batch → how much its rows count, by term."""


@dataclass(frozen=True)
class StepRows:
    """What the means of a step are taken by.

    Attributes:
        weights: of each micro-batch of this process, by term. denominators: by term, of the whole step.
        kept: of each term that selects, the mean weight of its rows.
    """

    weights: list[Weights]
    denominators: dict[str, float]
    kept: dict[str, float]


def count_step(
    batches: Sequence[TrainBatch],
    terms: Terms,
    weigh: Weigh,
    counts_of: Callable[[TrainBatch], Mapping[str, Sequence[int]]],
    processes: Processes,
) -> StepRows:
    """All processes call it; fillers count for nothing.

    Args:
        counts_of: micro-batch → by row kind, rows of each sample that can count.
    """
    weights = [weigh(one) for one in batches]
    real = [(counts_of(one), weight) for one, weight in zip(batches, weights) if not one.filler]
    weighed = [count_rows(counts, terms, weight) for counts, weight in real]
    selected = {name: term for name, term in terms.items() if any(name in weight for weight in weights)}
    plain = [count_rows(counts, selected) for counts, _ in real] if selected else []
    mine = [sum(one[name] for one in weighed) for name in terms] + [
        sum(one[name] for one in plain) for name in selected
    ]
    total = processes.sum(mine)
    denominators, every = dict(zip(terms, total)), dict(zip(selected, total[len(terms) :]))
    kept = {name: denominators[name] / rows for name, rows in every.items() if rows}
    return StepRows(weights, denominators, kept)
