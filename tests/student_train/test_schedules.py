"""Weights of terms over the steps of a stage: what each form says, and what is no form."""

from __future__ import annotations

import pytest

from student_train.losses.terms import RowTerm, label_loss
from student_train.schedules import parse_schedule, scheduled
from teacher_cache.errors import KdcliError


@pytest.mark.parametrize(
    ("text", "steps", "factors"),
    [
        ("constant:0.5", 3, [0.5, 0.5, 0.5]),
        ("linear:0:1", 5, [0, 0.25, 0.5, 0.75, 1]),
        ("linear:2:0.5", 1, [2]),
        ("warm-hold-decay:0.2:0.4", 10, [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]),
        ("warm-hold-decay:0:0.5:0.2", 4, [1, 1, 0.6, 0.2]),
        ("warm-hold-decay:1:0", 2, [0.5, 1]),
        ("warm-hold-decay:0.5:0.5", 1, [1]),
    ],
)
def test_factors(text: str, steps: int, factors: list[float]) -> None:
    schedule = parse_schedule("vis", text)
    assert [schedule.factor(step, steps) for step in range(steps)] == pytest.approx(factors)


def test_only_weights_of_named_terms_change() -> None:
    terms = {name: RowTerm(weight, "response", label_loss) for name, weight in (("reg", 1.0), ("res", 0.5))}
    assert scheduled(terms, {}, 3, 10) is terms
    found = scheduled(terms, {"res": parse_schedule("res", "linear:0:1")}, 5, 11)
    assert found["reg"] == terms["reg"] and found["res"].weight == 0.25 and found["res"].rows == "response"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cosine:1:0", "is not one of constant:F, linear:A:B"),
        ("linear:1", "is not one of"),
        ("linear:one:0", "is not one of"),
        ("linear:1:-1", "at least 0"),
        ("linear:nan:1", "at least 0"),
        ("linear:0:0", "0 at every step"),
        ("warm-hold-decay:0.7:0.7", "together at most 1"),
    ],
)
def test_what_is_no_schedule(text: str, says: str) -> None:
    with pytest.raises(KdcliError, match=f"schedule of vis: '{text}'.*{says}"):
        parse_schedule("vis", text)
