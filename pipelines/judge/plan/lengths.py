"""How long the rows of a mixture are, in tokens by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.judge.plan.mixture_sample import PartSample

HISTOGRAM_BINS = 12


@dataclass(frozen=True)
class Lengths:
    """Tokens of one kind a usable row of one part; ``histogram``: shares of the rows in equal bins from 0 to the largest."""

    part: str
    kind: str
    mean: float
    p50: int
    p95: int
    largest: int
    histogram: tuple[float, ...]


def part_lengths(part: PartSample) -> list[Lengths]:
    """Length distributions of one part: all tokens, then by kind."""
    values = {"all": [row.tokens for row in part.usable]}
    for kind in ("vision", "text", "response"):
        values[kind] = [getattr(row.counts, kind) for row in part.usable]
    return [lengths_of(part.part, kind, sorted(one)) for kind, one in values.items() if one]


def lengths_of(part: str, kind: str, values: Sequence[int]) -> Lengths:
    count, largest = len(values), values[-1]
    bins = [0] * HISTOGRAM_BINS
    for value in values:
        bins[min(HISTOGRAM_BINS - 1, value * HISTOGRAM_BINS // max(1, largest))] += 1
    p50, p95 = (values[min(count - 1, int(share * count))] for share in (0.5, 0.95))
    return Lengths(part, kind, sum(values) / count, p50, p95, largest, tuple(one / count for one in bins))
