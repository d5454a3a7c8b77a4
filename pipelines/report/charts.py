"""Loss curves as geometry: the template draws them, so that every text on the page goes through its escaping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.report.runs import RunRecord
from student_train.methods import terms_of

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 26
MAX_POINTS = 150
LOG_RATIO = 30
"""Above this ratio of the 95th to the 5th percentile a linear axis would show one drop and then a flat line."""

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Style:
    """How a run is drawn everywhere: ``colour`` indexes the page's palette, seeds of one name share it and differ by dash."""

    name: str
    colour: int
    dash: int


@dataclass(frozen=True)
class Line:
    """line, band: SVG path data; the band spans the smallest and largest of the steps that one drawn point stands for."""

    style: Style
    line: str
    band: str
    first: float
    last: float
    lowest: float


@dataclass(frozen=True)
class Chart:
    """One term of one stage, all runs in it. Ticks are (place, label)."""

    term: str
    log: bool
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    gaps: int

    @property
    def description(self) -> str:
        told = "; ".join(f"{one.style.name} from {short(one.first)} to {short(one.last)}" for one in self.lines)
        return f"{self.term} over optimizer steps{' on a logarithmic axis' if self.log else ''}: {told}"


@dataclass(frozen=True)
class Axis:
    """Values → pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / ((high - low) or 1) * (self.end - self.start), 1)


def run_styles(runs: Sequence[RunRecord]) -> list[Style]:
    """A colour a group, a dash a seed."""
    groups = list(dict.fromkeys(run.group for run in runs))
    seen: dict[str, int] = {}
    styles = []
    for run in runs:
        number = seen[run.group] = seen.get(run.group, -1) + 1
        colour = groups.index(run.group)
        # Colours repeat after six groups; the dash then tells the second round from the first.
        styles.append(Style(run.name, colour % 6, (number + colour // 6) % 4))
    return styles


def stage_charts(runs: Sequence[RunRecord]) -> list[tuple[str, list[Chart]]]:
    """(stage, a chart a term), in the order in which stages first occur. Each chart holds every run that has the term."""
    styles = run_styles(runs)
    names = dict.fromkeys(stage.name for run in runs for stage in run.stages if stage.points)
    result = []
    for name in names:
        series: dict[str, list[tuple[Style, Points]]] = {}
        for style, run in zip(styles, runs):
            for stage in (one for one in run.stages if one.name == name):
                for term in (*stage.terms, *stage.told):
                    points = [(p["step"], p[term]) for p in stage.points if term in p]
                    series.setdefault(term, []).append((style, points))
        if series.get("loss") == series.get("loss/reg") and len(series) == 2:
            series.pop("loss")  # one term of weight one: its total would be the same picture again
        charts = [chart for term, lines in series.items() if (chart := draw(term, lines))]
        result.append((name, charts))
    return result


def term_words(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """(term, what it is in words) of the loss terms that are drawn, each once; a term that its method does not explain is left out."""
    found: dict[tuple[str, str], None] = {}
    for stage in (stage for run in runs for stage in run.stages):
        words = terms_of(stage.method)
        for term in (key.removeprefix("loss/") for key in stage.terms):
            if term in words:
                found[term, words[term]] = None
    return list(found)


def draw(term: str, series: Sequence[tuple[Style, Points]]) -> Chart | None:
    """One chart; None where no value is finite."""
    finite = [(style, [(x, y) for x, y in points if math.isfinite(y)]) for style, points in series]
    finite = [(style, points) for style, points in finite if points]
    if not finite:
        return None
    gaps = sum(len(points) for _, points in series) - sum(len(points) for _, points in finite)
    values = sorted(y for _, points in finite for _, y in points)
    steps = [x for _, points in finite for x, _ in points]
    log = values[0] > 0 and values[int(0.95 * (len(values) - 1))] > LOG_RATIO * values[int(0.05 * (len(values) - 1))]
    x_axis = Axis(min(steps), max(max(steps), min(steps) + 1), LEFT, WIDTH - RIGHT)
    low, high = _room(values[0], values[-1], log)
    y_axis = Axis(low, high, HEIGHT - BOTTOM, TOP, log)
    return Chart(
        term=term,
        log=log,
        lines=[_line(style, points, x_axis, y_axis) for style, points in finite],
        x_ticks=[(x_axis(tick), short(tick)) for tick in ticks(x_axis.low, x_axis.high, whole=True)],
        y_ticks=[(y_axis(tick), short(tick)) for tick in (decades(low, high) if log else ticks(low, high))],
        gaps=gaps,
    )


def _room(low: float, high: float, log: bool) -> tuple[float, float]:
    """A little space above and below, also where all values are equal."""
    if log:
        return low / 1.3, high * 1.3
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return max(0.0, low - margin) if low >= 0 else low - margin, high + margin


def _line(style: Style, points: Points, x_axis: Axis, y_axis: Axis) -> Line:
    size = math.ceil(len(points) / MAX_POINTS)
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    centres = [(x_axis(_mean([x for x, _ in one])), [y for _, y in one]) for one in bins]
    line = "M" + "L".join(f"{x} {y_axis(_mean(ys))}" for x, ys in centres)
    if len(points) == 1:
        line += f"h{WIDTH - RIGHT - LEFT}"  # one value has no line: draw its level
    band = ""
    if size > 1:
        edge = [f"{x} {y_axis(max(ys))}" for x, ys in centres] + [
            f"{x} {y_axis(min(ys))}" for x, ys in reversed(centres)
        ]
        band = "M" + "L".join(edge) + "Z"
    values = [y for _, y in points]
    return Line(style, line, band, values[0], values[-1], min(values))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to six round numbers between the two."""
    raw = (high - low) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.99)
    if whole:
        step = max(1, round(step))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten; with 2 and 5 between where there are few, only every second or third where there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 5))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [tick for tick in ticks if low <= tick <= high] or [low, high]


def short(value: float) -> str:
    """A number in few characters: 12k, 0.05, 3e-7."""
    if value == 0:
        return "0"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}"
