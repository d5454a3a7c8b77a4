"""A budget chooses: the measured ways of all row kinds as one frontier, and the point of it that was asked for.

A step of the frontier stores every kind as cheaply as an angle allows, so that no kind is finer than the others need: rising bytes,
falling angles. Angles are of the student's whole gradient. They are measured where the choice depends on it, and carried over to other
ways of the kind in the ratio of the angles of the head's gradient, which are measured of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.judge.preflight.budget import ANGLE, KL, Budget
from pipelines.judge.preflight.ladder import Measured
from pipelines.judge.preflight.steps import label_of


@dataclass(frozen=True)
class Step:
    """One step of the frontier.

    Attributes:
        ways: row kind → how it is stored. angle: degrees, the worst of the kinds; NaN: not to be had. share: as ``Budget.share``.
        bytes_per_token, bytes_per_sample: of all fields.
    """

    ways: Mapping[str, Measured]
    angle: float
    kl: float
    share: float
    bytes_per_token: float
    bytes_per_sample: float

    @property
    def fields(self) -> dict[str, dict[str, Any]]:
        """Field → parameters."""
        return {name: dict(params) for one in self.ways.values() for name, params in one.candidate.fields.items()}

    @property
    def label(self) -> str:
        return label_of({kind: one.label for kind, one in self.ways.items()})

    def to_json(self) -> dict[str, Any]:
        return {
            "labels": {kind: one.label for kind, one in self.ways.items()},
            "fields": self.fields,
            "field_bytes": {name: size for one in self.ways.values() for name, size in one.field_bytes.items()},
            **{name: None if math.isnan(value := getattr(self, name)) else value for name in ("angle", "kl")},
            **{name: getattr(self, name) for name in ("bytes_per_token", "bytes_per_sample")},
            "measured": all(one.angles for one in self.ways.values()),
        }


@dataclass(frozen=True)
class TokenCounts:
    """What bytes are counted over: stored token rows of a sample by kind, and bytes a sample of fields that are not chosen here."""

    rows: Mapping[str, float]
    other_bytes: float

    def sizes(self, ways: Mapping[str, Measured]) -> tuple[float, float]:
        """Bytes (a token, a sample)."""
        sample = self.other_bytes + sum(one.bytes_per_row * self.rows[kind] for kind, one in ways.items())
        return sample / max(1e-9, sum(self.rows.values())), sample


def frontier(measured: Mapping[str, Sequence[Measured]], tokens: TokenCounts, budget: Budget) -> list[Step]:
    """Rising bytes, falling angles; empty where some kind has no way at all."""
    usable = {kind: [one for one in ways if not one.error] for kind, ways in measured.items()}
    shares = {kind: shares_of(ways, budget) for kind, ways in usable.items()}
    found: list[Step] = []
    for limit in sorted({share for each in shares.values() for share in each}, reverse=True):
        within = {
            kind: [one for one, share in zip(ways, shares[kind]) if share <= limit] for kind, ways in usable.items()
        }
        if not all(within.values()):
            break
        ways = {kind: min(each, key=lambda one: one.bytes_per_row) for kind, each in within.items()}
        step = step_of(ways, usable, tokens, budget)
        if not found or step.bytes_per_sample > found[-1].bytes_per_sample:
            found.append(step)
        elif step.share < found[-1].share:
            found[-1] = step
    return found


def step_of(
    ways: Mapping[str, Measured], usable: Mapping[str, Sequence[Measured]], tokens: TokenCounts, budget: Budget
) -> Step:
    angles = {kind: angle_of(one, usable[kind]) for kind, one in ways.items()}
    known = [angle for angle in angles.values() if not math.isnan(angle)]
    share = max((budget.share(angles[kind], one.kl) for kind, one in ways.items()), default=0.0)
    kl = max((one.kl for one in ways.values() if not math.isnan(one.kl)), default=math.nan)
    return Step(ways, max(known, default=math.nan), kl, share, *tokens.sizes(ways))


def shares_of(ways: Sequence[Measured], budget: Budget) -> list[float]:
    return [budget.share(angle_of(one, ways), one.kl) for one in ways]


def angle_of(one: Measured, ways: Sequence[Measured]) -> float:
    """Degrees of its whole gradient: measured, or the head's in the ratio of those ways of the kind that have both."""
    if not math.isnan(one.angle):
        return one.angle
    both = [way for way in ways if way.angle > 0 and way.head_angle > 0]
    return one.head_angle * (sum(way.angle / way.head_angle for way in both) / len(both) if both else 1.0)


def choose(
    measured: Mapping[str, Sequence[Measured]],
    tokens: TokenCounts,
    budget: Budget,
    confirm: Callable[[Measured], None] = lambda one: None,
) -> tuple[Step | None, list[Step], str]:
    """(the chosen step, the whole frontier, why it is not what was asked for: "" where it is). None: some kind cannot be stored at all.

    Args:
        confirm: measures whole gradients of a way that may be chosen.
    """
    asked: set[int] = set()
    while True:
        steps = frontier(measured, tokens, budget)
        if not steps:
            return None, [], why_nothing(measured)
        chosen = pick(steps, budget)
        open_ways = [one for one in (chosen or steps[-1]).ways.values() if id(one) not in asked]
        if not open_ways:
            return (chosen, steps, "") if chosen else nearest(steps, budget)
        for one in open_ways:
            asked.add(id(one))
            confirm(one)


def pick(steps: Sequence[Step], budget: Budget) -> Step | None:
    """The cheapest that is near enough, or the nearest that is cheap enough; None: there is none."""
    if budget.bytes_per_token:
        return next((one for one in reversed(steps) if one.bytes_per_token <= budget.bytes_per_token), None)
    return next((one for one in steps if one.share <= 1), None)


def nearest(steps: Sequence[Step], budget: Budget) -> tuple[Step, list[Step], str]:
    """What comes nearest to a budget that cannot be kept, and the line that says so."""
    one = steps[0] if budget.bytes_per_token else min(steps, key=lambda step: step.share)
    asked = budget.asked() or f"{ANGLE:g}° and {KL:g} nats"
    return one, list(steps), f"no measured setting meets {asked}: closest are {nearest_words(one)}"


def nearest_words(one: Any) -> str:
    angle = "" if math.isnan(one.angle) else f"{one.angle:.2g}°, "
    return f"{angle}{one.kl:.2g} nats at {one.bytes_per_token:,.1f} bytes a token ({one.label})"


def why_nothing(measured: Mapping[str, Sequence[Measured]]) -> str:
    kind, ways = next((kind, ways) for kind, ways in measured.items() if all(one.error for one in ways))
    return f"{kind} rows: {ways[0].error if ways else 'none among the held-out rows'}"
