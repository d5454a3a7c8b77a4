"""Curves as geometry: nothing outside the frame, nothing lost silently, ticks that a person would choose."""

from __future__ import annotations

import math
import re

import pytest

from pipelines.report.charts import HEIGHT, LEFT, RIGHT, WIDTH, Style, draw, run_styles, short, stage_charts
from pipelines.report.runs import read_runs

STYLE = Style("kd", 0, 0)


def coordinates(path: str) -> list[tuple[float, float]]:
    numbers = list(map(float, re.findall(r"-?[\d.]+", path.split("h")[0])))
    return list(zip(numbers[::2], numbers[1::2]))


@pytest.mark.parametrize("steps", [1, 2, 50, 149, 151, 1000])
@pytest.mark.parametrize("shape", [lambda s: 3.0, lambda s: math.exp(-s / 20), lambda s: -s, lambda s: 0.0])
def test_every_point_lies_inside_the_frame(steps, shape):
    chart = draw("loss", [(STYLE, [(s, shape(s)) for s in range(steps)])])
    for path in (chart.lines[0].line, chart.lines[0].band):
        for x, y in coordinates(path):
            assert LEFT <= x <= WIDTH - RIGHT and 0 <= y <= HEIGHT
    assert len(coordinates(chart.lines[0].line)) <= 150
    for place, _ in chart.y_ticks:
        assert 0 <= place <= HEIGHT


def test_falling_values_fall_on_the_page():
    line = coordinates(draw("loss", [(STYLE, [(0, 3.0), (1, 2.0), (2, 1.0)])]).lines[0].line)
    assert [y for _, y in line] == sorted(y for _, y in line)  # SVG counts y downwards
    assert [x for x, _ in line] == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]


def test_the_axis_is_logarithmic_only_where_values_span_decades():
    assert draw("t", [(STYLE, [(s, 10.0 ** -(s / 10)) for s in range(40)])]).log
    assert not draw("t", [(STYLE, [(s, 2.0 - s / 40) for s in range(40)])]).log
    assert not draw("t", [(STYLE, [(s, 0.0 if s == 0 else 10.0 ** -(s / 10)) for s in range(40)])]).log


def test_values_that_are_not_finite_are_counted():
    chart = draw("t", [(STYLE, [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)])])
    assert chart.gaps == 2 and (chart.lines[0].first, chart.lines[0].last) == (1.0, 2.0)
    assert draw("t", [(STYLE, [(0, math.nan)])]) is None


def test_binned_points_keep_their_extremes_in_the_band():
    points = [(s, 5.0 if s == 777 else 1.0 + (s % 2)) for s in range(1500)]
    line = draw("t", [(STYLE, points)]).lines[0]
    assert min(y for _, y in coordinates(line.band)) < min(y for _, y in coordinates(line.line)) - 20


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.5, "1.5"),
        (12000, "12k"),
        (2500000, "2.5M"),
        (0.00012, "1.2e-4"),
        (1e-7, "1e-7"),
        (150.0, "150"),
        (2600, "2600"),
    ],
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_runs_meet_in_one_chart_a_term_and_a_lone_term_is_drawn_once(make_run):
    runs = read_runs([make_run("sft"), make_run("kd-seed0", ("reg", "res")), make_run("kd-seed1", ("reg", "res"))])
    ((stage, charts),) = stage_charts(runs)
    assert stage == "DFT"
    assert {chart.term: [line.style.name for line in chart.lines] for chart in charts} == {
        "loss": ["sft", "kd-seed0", "kd-seed1"],
        "loss/reg": ["sft", "kd-seed0", "kd-seed1"],
        "loss/res": ["kd-seed0", "kd-seed1"],
    }
    assert [chart.term for chart in stage_charts(runs[:1])[0][1]] == ["loss/reg"]
    sft, first, second = run_styles(runs)
    assert first.colour == second.colour != sft.colour and first.dash != second.dash
