"""How the weight of a term goes through a stage: a factor that is a function of the step alone, so that a resumed run has the same.

``constant:F``: F all the time. ``linear:A:B``: evenly from A at the first step to B at the last. ``warm-hold-decay:W:D`` or
``warm-hold-decay:W:D:E``: evenly up to 1 over the first share W of the steps, then 1, then evenly down to E (0) at the last of the share D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from student_train.losses.terms import Terms
from teacher_cache.errors import KdcliError


@dataclass(frozen=True)
class Schedule:
    """kind: of ``KINDS``. numbers: as they stand behind it."""

    kind: str
    numbers: tuple[float, ...]

    def factor(self, step: int, total: int) -> float:
        """Of the term's weight at ``step``, counted from 0, of ``total``."""
        return KINDS[self.kind](step, total, self.numbers)


def constant(step: int, total: int, numbers: Sequence[float]) -> float:
    return numbers[0]


def linear(step: int, total: int, numbers: Sequence[float]) -> float:
    first, last = numbers
    return first + (last - first) * step / max(1, total - 1)


def warm_hold_decay(step: int, total: int, numbers: Sequence[float]) -> float:
    warm, decay, end = numbers[0], numbers[1], numbers[2] if len(numbers) > 2 else 0.0
    warming, falling = math.ceil(warm * total), math.ceil(decay * total)
    if step < warming:
        return (step + 1) / warming
    behind = step - (total - falling) + 1  # steps of the fall that are made with this one
    return 1.0 + (end - 1.0) * behind / falling if behind > 0 else 1.0


KINDS: Mapping[str, Callable[[int, int, Sequence[float]], float]] = {
    "constant": constant,
    "linear": linear,
    "warm-hold-decay": warm_hold_decay,
}
COUNTS = {"constant": (1,), "linear": (2,), "warm-hold-decay": (2, 3)}
"""How many numbers stand behind each."""
FORMS = "constant:F, linear:A:B, warm-hold-decay:W:D, warm-hold-decay:W:D:E"


def parse_schedule(term: str, text: str) -> Schedule:
    """KdcliError of one line that names the term and the forms."""
    place = f"schedule of {term}: {text!r}"
    kind, *given = (part.strip() for part in text.split(":"))
    try:
        numbers = tuple(map(float, given))
    except ValueError:
        numbers = ()
    if kind not in KINDS or len(numbers) not in COUNTS[kind]:
        raise KdcliError(f"{place} is not one of {FORMS}")
    if not all(0 <= one < math.inf for one in numbers):
        raise KdcliError(f"{place}: its numbers must be at least 0")
    if kind == "warm-hold-decay" and numbers[0] + numbers[1] > 1:
        raise KdcliError(f"{place}: W and D are shares of the steps, together at most 1")
    if kind != "warm-hold-decay" and not any(numbers):
        raise KdcliError(f"{place}: the factor is 0 at every step: set the term's weight to 0 instead")
    return Schedule(kind, numbers)


def scheduled(terms: Terms, schedules: Mapping[str, Schedule], step: int, total: int) -> Terms:
    """The terms with their weights at a step."""
    if not schedules:
        return terms
    weights = {name: term.weight * _factor(schedules.get(name), step, total) for name, term in terms.items()}
    return {name: replace(term, weight=weights[name]) for name, term in terms.items()}


def _factor(schedule: Schedule | None, step: int, total: int) -> float:
    return schedule.factor(step, total) if schedule else 1.0
