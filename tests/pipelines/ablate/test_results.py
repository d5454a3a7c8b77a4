"""Means, spreads and paired differences against numpy and scipy, missing cells included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipelines.ablate.plot import difference_plots, value_plots
from pipelines.ablate.results import MEAN, NLL, Section, overview, paired_table, results_table, short_metrics, spread

VALUES = {
    "sft": {MEAN: {0: 50.0, 1: 52.5, 2: 51.0, 3: 49.0}, NLL: {0: 0.9, 1: 0.8, 2: 0.85, 3: 0.95}},
    "kd": {MEAN: {0: 53.0, 1: 53.5, 3: 52.0}, NLL: {0: 0.7, 1: 0.75, 3: 0.8}},
    "late": {},
    "single": {MEAN: {1: 60.0}},
}
SECTION = Section("heldout", tuple(VALUES), (MEAN, NLL), VALUES)


def test_spreads_are_numpys() -> None:
    one = SECTION.spread("sft", MEAN)
    values = np.array(list(VALUES["sft"][MEAN].values()))
    assert one is not None and one.n == 4
    assert one.mean == pytest.approx(values.mean()) and one.std == pytest.approx(values.std(ddof=1))


def test_differences_pair_the_seeds_that_both_have() -> None:
    one = SECTION.difference("kd", "sft", MEAN)
    gaps = np.array([53.0 - 50.0, 53.5 - 52.5, 52.0 - 49.0])
    low, high = stats.t.interval(0.95, 2, gaps.mean(), stats.sem(gaps))
    assert one is not None and one.n == 3 and one.half_width is not None
    assert (one.mean, one.std) == pytest.approx((gaps.mean(), gaps.std(ddof=1)))
    assert (one.mean - one.half_width, one.mean + one.half_width) == pytest.approx((low, high))
    lines = paired_table(SECTION, "sft", [MEAN]).splitlines()
    assert lines[2].split("|")[2].strip() == f"{gaps.mean():+.1f} ± {gaps.std(ddof=1):.1f} [{low:+.1f}, {high:+.1f}]"
    assert lines[2].split("|")[3].strip() == "3"
    assert [cell.strip() for cell in lines[3].split("|")[1:4]] == ["late", "–", "0"]
    assert [cell.strip() for cell in lines[4].split("|")[1:4]] == ["single", "+7.5", "1"]


def test_the_table_says_how_many_seeds_it_has() -> None:
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in results_table(SECTION, [MEAN, NLL]).splitlines()
    ]
    assert lines[0] == ["heldout", MEAN, NLL, "seeds"]
    assert lines[2] == ["sft", "50.6 ± 1.5", "0.875 ± 0.065", "4"]
    assert lines[4] == ["late", "–", "–", "0"] and lines[5] == ["single", "60.0", "–", "1"]
    assert short_metrics(SECTION) == [MEAN, NLL]


def test_several_evaluations_have_a_table_of_their_means() -> None:
    other = Section("few tokens", SECTION.rows, SECTION.metrics, {**VALUES, "sft": {MEAN: {0: 1.0}}})
    means, nats = (text.splitlines() for text in overview([SECTION, other]))
    assert [cell.strip() for cell in means[0].split("|")[1:-1]] == [MEAN, "heldout", "few tokens"]
    assert [cell.strip() for cell in means[2].split("|")[1:-1]] == ["sft", "50.6 ± 1.5", "1.0"]
    assert [cell.strip() for cell in nats[2].split("|")[1:-1]] == ["sft", "0.875 ± 0.065", "–"]
    assert overview([SECTION]) == []


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8))
def test_any_spread_is_numpys(values: list[float]) -> None:
    one = spread(values)
    assert one is not None and one.std is not None
    assert one.mean == pytest.approx(float(np.mean(values)), abs=1e-6)
    assert one.std == pytest.approx(float(np.std(values, ddof=1)), abs=1e-6)


def test_plots_stay_on_the_canvas_in_order() -> None:
    for one in (*value_plots(SECTION), *difference_plots(SECTION, "sft")):
        places = [x for dot in one.dots for x in (dot.low, dot.mean, dot.high, *dot.seeds)]
        assert all(one.left <= x <= 640 for x in places)
        assert all(dot.low <= dot.mean <= dot.high for dot in one.dots)
    values, nats = value_plots(SECTION)
    assert [dot.label for dot in values.dots] == ["sft", "kd", "single"] and [d.label for d in nats.dots] == [
        "sft",
        "kd",
    ]
    gaps, _ = difference_plots(SECTION, "sft")
    assert gaps.zero is not None and all(gaps.zero < dot.mean for dot in gaps.dots)
