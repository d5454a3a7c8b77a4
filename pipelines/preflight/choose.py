"""The cheapest parameters whose error on held-out rows is within the limits; where none is, the best there is and why it is not enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.preflight.ladder import Bench, Candidate, Measured


@dataclass(frozen=True)
class Limits:
    """max_kl: nats. max_angle: degrees. max_bytes: a sample, of this row kind; None: no limit."""

    max_kl: float
    max_angle: float
    max_bytes: float | None = None


@dataclass(frozen=True)
class Choice:
    """What was chosen for one row kind. reasons: why it is not within the limits, none where it is."""

    kind: str
    chosen: Measured
    measured: tuple[Measured, ...]
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "label": self.chosen.candidate.label,
            "fields": {name: dict(params) for name, params in self.chosen.candidate.fields.items()},
            "ladder": [one.to_json() for one in self.measured],
            "reasons": list(self.reasons),
        }


def choose(
    kind: str,
    ladder: Sequence[Candidate],
    bench: Bench,
    limits: Limits,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Choice:
    """Measure from the cheapest on, and ask the student's parameters about those that come near, until one is within the limits."""
    measured = [bench.size(candidate) for candidate in ladder]
    measured.sort(key=lambda one: (bool(one.error), one.bytes_per_row))
    affordable = [one for one in measured if not one.error and excess_bytes(one, limits) <= 1]
    directions = bench.needed(kind)
    for done, one in enumerate(affordable):
        progress(done, len(affordable))
        bench.measure(one)
        if worst(one, limits, directions) <= 1:
            bench.confirm(one)
            if worst(one, limits, directions) <= 1:
                return Choice(kind, one, tuple(measured), ())
    usable = [one for one in measured if not one.error]
    if not usable:
        return Choice(kind, measured[0], tuple(measured), (f"{kind} rows: {measured[0].error}",))
    best = min(affordable, key=lambda one: worst(one, limits, directions)) if affordable else usable[0]
    if math.isnan(best.kl):
        bench.measure(best)
    if not best.angles:
        bench.confirm(best)
    return Choice(kind, best, tuple(measured), (why_not(kind, best, limits, directions, bool(affordable)),))


def excess_bytes(one: Measured, limits: Limits) -> float:
    return one.bytes_per_sample / limits.max_bytes if limits.max_bytes else 0.0


def worst(one: Measured, limits: Limits, directions: Sequence[str]) -> float:
    """The largest share of a limit that is used; above 1: not good enough. Angles of whole gradients stand for those of the head."""
    angles = list(one.angles.values()) or [one.head_angles.get(name, 0.0) for name in directions]
    shares = [one.kl / limits.max_kl, *(angle / limits.max_angle for angle in angles)]
    return max(0.0 if math.isnan(share) else share for share in shares)


def why_not(kind: str, best: Measured, limits: Limits, directions: Sequence[str], affordable: bool) -> str:
    angles = list(best.angles.values()) or [best.head_angles.get(name, 0.0) for name in directions]
    angle = max((one for one in angles if not math.isnan(one)), default=0.0)
    if not affordable:
        return (
            f"{kind} rows: no parameters fit --max-bytes ({limits.max_bytes:,.0f} B a sample are left for them, "
            f"the smallest take {best.bytes_per_sample:,.0f}): raise --max-bytes"
        )
    return (
        f"{kind} rows: no parameters reach --max-kl {limits.max_kl:g} and --max-angle {limits.max_angle:g} "
        f"(nearest: {best.candidate.label}, KL {best.kl:.2g}, {angle:.2g}°): relax them, or raise --rows or --max-bytes"
    )
