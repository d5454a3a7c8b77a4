"""Quantisers of single numbers: bounds, order, infinities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codecs.scales import BEND, INFINITE, LogOdds, LogScale, Uniform
from teacher_cache.errors import KdcliError

STEPS = st.sampled_from([1 / 128, 1 / 64, 0.1, 1.0])
POSITIVE = st.one_of(st.floats(0, 1e-3), st.floats(0, 40), st.floats(0, 1e6))


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32)


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e5, 1e5, width=32), STEPS)
def test_uniform_is_within_half_a_step(value: float, step: float) -> None:
    restored = Uniform(step).restore(Uniform(step).quantise(one(value)))
    assert restored.dtype == torch.float32
    assert abs(float(restored) - value) <= step / 2 * (1 + 1e-9) + abs(value) * 2**-24


@settings(max_examples=200, deadline=None)
@given(POSITIVE, STEPS)
def test_log_scale_is_within_its_bound(value: float, step: float) -> None:
    """Half a step at 0, more in proportion to 1 + x/4; the second order of the expansion is e^(step/8) − 1."""
    value = float(one(value))
    restored = float(LogScale(step).restore(LogScale(step).quantise(one(value))))
    bound = (BEND + value) * math.expm1(step / (2 * BEND))
    assert abs(restored - value) <= bound * (1 + 1e-9) + value * 2**-23
    assert bound <= step / 2 * (1 + value / BEND) * (1 + step / 7)


@settings(max_examples=200, deadline=None)
@given(POSITIVE, st.booleans(), STEPS)
def test_log_odds_has_the_bound_to_both_sides(value: float, negative: bool, step: float) -> None:
    value = -float(one(value)) if negative else float(one(value))
    restored = float(LogOdds(step).restore(LogOdds(step).quantise(one(value))))
    assert (
        abs(restored - value) <= (BEND + abs(value)) * math.expm1(step / (2 * BEND)) * (1 + 1e-9) + abs(value) * 2**-23
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(POSITIVE, min_size=2, max_size=20), STEPS)
def test_order_is_kept(values: list[float], step: float) -> None:
    falling = torch.tensor(sorted(values, reverse=True))
    for quantiser in (LogScale(step), LogOdds(step), Uniform(step)):
        symbols = quantiser.quantise(falling)
        assert symbols.dtype == torch.int64
        assert (symbols.diff() <= 0).all()
        assert (quantiser.restore(symbols).diff() <= 0).all()


@pytest.mark.parametrize("step", [1 / 128, 1.0])
def test_what_was_restored_is_restored_again(step: float) -> None:
    symbols = torch.arange(0, 2000)
    for quantiser, each in ((LogScale(step), symbols[: int(60 / step)]), (Uniform(step), symbols)):
        assert torch.equal(quantiser.quantise(quantiser.restore(each)), each)
    both = torch.cat([-symbols.flip(0), symbols])[2000 - int(60 / step) :][: int(120 / step)]
    assert torch.equal(LogOdds(step).quantise(LogOdds(step).restore(both)), both)


def test_zero_and_infinity_are_exact() -> None:
    ends = torch.tensor([0.0, torch.inf])
    assert LogScale(0.1).quantise(ends).tolist() == [0, INFINITE]
    assert torch.equal(LogScale(0.1).restore(LogScale(0.1).quantise(ends)), ends)
    both = torch.tensor([-torch.inf, 0.0, torch.inf])
    assert LogOdds(0.1).quantise(both).tolist() == [-INFINITE, 0, INFINITE]
    assert torch.equal(LogOdds(0.1).restore(LogOdds(0.1).quantise(both)), both)
    assert LogScale(0.1).quantise(torch.tensor([-1e-7])).tolist() == [0], "a log-prob may round to just above 0"


def test_the_largest_float_is_not_infinite() -> None:
    top = torch.tensor([torch.finfo(torch.float32).max])
    for quantiser in (LogScale(1 / 64), LogOdds(1 / 64)):
        assert int(quantiser.quantise(top)) < INFINITE
        assert torch.isfinite(quantiser.restore(quantiser.quantise(top * 0.9))).all()


def test_negative_symbols_of_a_damaged_record_are_nan() -> None:
    assert torch.isnan(LogScale(0.1).restore(torch.tensor([-1, -(2**31)]))).all()


@pytest.mark.parametrize("quantiser", [Uniform(0.1), LogScale(0.1), LogOdds(0.1)], ids=lambda q: type(q).__name__)
def test_nan_is_never_stored(quantiser: Uniform | LogScale | LogOdds) -> None:
    with pytest.raises(KdcliError, match="cannot be coded"):
        quantiser.quantise(torch.tensor([1.0, torch.nan]))


def test_uniform_refuses_infinity() -> None:
    with pytest.raises(KdcliError, match="cannot be coded"):
        Uniform(0.1).quantise(torch.tensor([torch.inf]))


def test_nothing_at_all() -> None:
    for quantiser in (Uniform(0.1), LogScale(0.1), LogOdds(0.1)):
        assert quantiser.restore(quantiser.quantise(torch.zeros(0))).shape == (0,)
