"""Dots and intervals as geometry: a line a row, for one metric. The template draws them, so every text goes through its escaping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.ablate.results import MEAN, NLL, Section, Spread, interval, written
from pipelines.report.charts import Axis, short, ticks

WIDTH, LINE, TOP, BOTTOM, RIGHT = 640, 26, 8, 30, 16
CHARACTER = 6.6
"""Pixels of a label's character at the page's 12 px, generously."""
LABEL = 34
"""Longer labels are cut on the picture; the table has them whole."""


@dataclass(frozen=True)
class Dot:
    """One row. seeds: places of the single seeds. low, high: ends of the drawn interval; both the mean where there is none."""

    label: str
    told: str
    y: float
    mean: float
    low: float
    high: float
    seeds: list[float]


@dataclass(frozen=True)
class DotPlot:
    """One metric over all rows. zero: place of the line of no difference, None where values are no differences."""

    title: str
    description: str
    height: float
    left: float
    dots: list[Dot]
    x_ticks: list[tuple[float, str]]
    zero: float | None


def value_plots(section: Section) -> list[DotPlot]:
    """The means, row by row: every seed, their mean, ± one sample standard deviation."""
    plots = []
    for metric in (MEAN, NLL):
        seeds = {row: list(section.values[row].get(metric, {}).values()) for row in section.rows}
        spreads = {row: section.spread(row, metric) for row in section.rows}
        plots.append(_plot(metric, "", metric, spreads, seeds, lambda one: one.std))
    return [one for one in plots if one]


def difference_plots(section: Section, baseline: str) -> list[DotPlot]:
    """Rows less the baseline: every pair, their mean, and its 95 % interval."""
    plots = []
    for metric in (MEAN, NLL):
        theirs = section.values[baseline].get(metric, {})
        spreads, seeds = {}, {}
        for row in section.rows:
            if row != baseline:
                ours = section.values[row].get(metric, {})
                seeds[row] = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
                spreads[row] = section.difference(row, baseline, metric)
        title = f"{metric}: less {baseline}"
        plots.append(_plot(title, baseline, metric, spreads, seeds, lambda one: one.half_width))
    return [one for one in plots if one]


def _plot(
    title: str,
    baseline: str,
    metric: str,
    spreads: dict[str, Spread | None],
    seeds: dict[str, list[float]],
    half: Callable[[Spread], float | None],
) -> DotPlot | None:
    found = {row: one for row, one in spreads.items() if one}
    if not found:
        return None
    ends = [one.mean + sign * (half(one) or 0.0) for one in found.values() for sign in (-1, 1)]
    ends += [value for row in found for value in seeds[row]] + ([0.0] if baseline else [])
    margin = (max(ends) - min(ends)) * 0.04 or abs(ends[0]) * 0.05 or 1.0
    left = 12 + CHARACTER * min(LABEL, max(map(len, found)))
    axis = Axis(min(ends) - margin, max(ends) + margin, left, WIDTH - RIGHT)
    dots = [
        _dot(row, one, half(one) or 0.0, seeds[row], axis, TOP + LINE * (number + 0.5), metric, bool(baseline))
        for number, (row, one) in enumerate(found.items())
    ]
    return DotPlot(
        title=title,
        description=f"{title}: " + "; ".join(f"{row} {dot.told}" for row, dot in zip(found, dots)),
        height=TOP + LINE * len(dots) + BOTTOM,
        left=left,
        dots=dots,
        x_ticks=[(axis(tick), short(float(f"{tick:.6g}"))) for tick in ticks(axis.low, axis.high)],
        zero=axis(0.0) if baseline else None,
    )


def _dot(
    row: str, one: Spread, half: float, seeds: Sequence[float], axis: Axis, y: float, metric: str, signed: bool
) -> Dot:
    told = written(one, metric, signed) + (interval(one, metric) if signed else "") + f", n = {one.n}"
    label = row if len(row) <= LABEL else row[: LABEL - 1] + "…"
    return Dot(label, told, y, axis(one.mean), axis(one.mean - half), axis(one.mean + half), [axis(v) for v in seeds])
