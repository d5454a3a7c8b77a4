"""The fidelity frontier as geometry: bytes a row against what a stored distribution does to the student's gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.report.charts import Axis, decades, short
from pipelines.report.fidelity_files import OWN, LossTerm, MeasuredFile, StoredFidelity

WIDTH, HEIGHT = 340, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 42
FLOORS = {"angle": 0.003, "nats": 1e-8}
"""Values below are drawn here: a logarithm has no room for 0."""
FAMILIES = {
    "head 8 + sketch": (0, "circle"),
    "other head + sketch": (3, "circle"),
    "sketch": (5, "diamond"),
    "top-k": (1, "square"),
    "sampled": (2, "up"),
    "hidden": (4, "down"),
}
"""Family → (colour of the page's palette, shape): shapes tell them apart without colour."""
SHAPES = {
    "circle": "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "m-3.5-3.5h7v7h-7z",
    "diamond": "m0-4.8 4.2 4.8-4.2 4.8-4.2-4.8z",
    "up": "m0-4.5 4.4 8h-8.8z",
    "down": "m0 4.5 4.4-8h-8.8z",
    "star": "m0-7 1.9 4.8 5.1.2-4 3.2 1.4 5-4.4-2.9-4.4 2.9 1.4-5-4-3.2 5.1-.2z",
}
LETTER, LINE = 5.6, 12
"""Width of a drawn letter, and height of a line of text, in the chart's units."""


@dataclass(frozen=True)
class Mark:
    """One measured way to store a row. best: no other one is both smaller and nearer. text: (x, y, anchor) of its label, or None."""

    stored: StoredFidelity
    x: float
    y: float
    path: str
    colour: int
    label: str
    told: str
    best: bool
    own: bool
    text: tuple[float, float, str] | None


@dataclass(frozen=True)
class Scatter:
    """One row kind and one measure. front: SVG path data of the frontier, as steps."""

    title: str
    unit: str
    marks: list[Mark]
    front: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    floor: float | None

    @property
    def description(self) -> str:
        told = "; ".join(f"{one.label}: {one.told}" for one in self.marks if one.best or one.own)
        return f"{self.title}, bytes a row against {self.unit}, both logarithmic. Not beaten by any other: {told}"


@dataclass(frozen=True)
class FrontierRow:
    """One line of the table, as text."""

    kind: str
    label: str
    cells: list[str]
    best: bool
    own: bool


@dataclass(frozen=True)
class FrontierPlot:
    """One file of measurements. families: (name, path, colour) for the legend. columns: of the table."""

    name: str
    about: str
    charts: list[Scatter]
    families: list[tuple[str, str, int]]
    columns: list[str]
    rows: list[FrontierRow]
    terms: list[tuple[str, str, list[str]]]


def frontiers(measured: Sequence[MeasuredFile]) -> list[FrontierPlot]:
    return [_frontier(one) for one in measured if one.stored or one.terms]


def _frontier(one: MeasuredFile) -> FrontierPlot:
    charts = [chart for kind in dict.fromkeys(each.kind for each in one.stored) for chart in _charts(kind, one.stored)]
    seen = {each.family for each in one.stored}
    families = [(name, SHAPES[shape], colour) for name, (colour, shape) in FAMILIES.items() if name in seen]
    directions = [d for d in ("forward", "reverse") if any(d in each.angles for each in one.stored)]
    losses = [d for d in directions if any(math.isfinite(each.loss_errors.get(d, math.nan)) for each in one.stored)]
    columns = ["bytes", "KL, nats"]
    columns += [f"{d}: {what}" for d in directions for what in (["loss", "angle"] if d in losses else ["angle"])]
    best = [mark.stored for chart in charts for mark in chart.marks if mark.best]
    rows = [_row(each, directions, losses, any(each is mark for mark in best)) for each in _sorted(one.stored)]
    return FrontierPlot(one.name, one.about, charts, families, columns, rows, [_term_cells(each) for each in one.terms])


def _sorted(stored: Sequence[StoredFidelity]) -> list[StoredFidelity]:
    return sorted(stored, key=lambda one: (one.kind, one.bytes))


def _charts(kind: str, stored: Sequence[StoredFidelity]) -> list[Scatter]:
    """A chart a direction of KL; where no student was compared with these rows, one of the divergence itself."""
    mine = [one for one in stored if one.kind == kind]
    ways: list[tuple[str, str, str, Callable[[StoredFidelity], float]]] = [
        (f"{kind} rows, {d} KL", "gradient angle in degrees", "angle", lambda one, d=d: one.angles.get(d, math.nan))  # type: ignore[misc]
        for d in ("forward", "reverse")
    ]
    charts = [chart for way in ways if (chart := _scatter(*way, mine))]
    plain = (f"{kind} rows", "divergence from the live teacher in nats", "nats", lambda one: one.kl)
    return charts or [chart for chart in [_scatter(*plain, mine)] if chart]


def _scatter(
    title: str, unit: str, scale: str, value: Callable[[StoredFidelity], float], stored: Sequence[StoredFidelity]
) -> Scatter | None:
    """None where fewer than two points can be drawn."""
    points = [(one, one.bytes, value(one)) for one in stored if one.bytes > 0 and math.isfinite(value(one))]
    if len(points) < 2:
        return None
    floor = FLOORS[scale]
    drawn = [max(y, floor) for _, _, y in points]
    x_axis = Axis(min(x for _, x, _ in points) / 1.25, max(x for _, x, _ in points) * 1.25, LEFT, WIDTH - RIGHT, True)
    y_axis = Axis(min(drawn) / 1.4, max(drawn) * 1.4, HEIGHT - BOTTOM, TOP, True)
    front = _pareto([(x, y) for (_, x, _), y in zip(points, drawn)])
    marks = []
    places = [(x_axis(x), y_axis(y)) for (_, x, _), y in zip(points, drawn)]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    order = sorted(range(len(points)), key=lambda i: (points[i][0].family != OWN, i not in front, points[i][1]))
    for i in order:
        one, size, exact = points[i]
        own = one.family == OWN or one.chosen
        colour, shape = FAMILIES.get(one.family, (0, "star"))
        (x, y), best = places[i], i in front
        name = one.label if one.family != OWN else OWN
        text = _place(name, x, y, taken) if best or own else None
        told = f"{size:.1f} bytes, {exact:.2g} {'°' if scale == 'angle' else 'nats'}"
        path = SHAPES["star" if one.family == OWN else shape]
        marks.append(Mark(one, x, y, path, colour, name, told, best, own, text))
    marks.reverse()  # what matters is drawn last
    return Scatter(
        title,
        unit,
        marks,
        _steps([places[i] for i in front]),
        [(x_axis(tick), short(tick)) for tick in decades(x_axis.low, x_axis.high)],
        [(y_axis(tick), short(tick)) for tick in decades(y_axis.low, y_axis.high)],
        y_axis(floor) if min(drawn) == floor else None,
    )


def _pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Those that no other beats in both, the smallest first."""
    best, found = math.inf, []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best:
            best = points[i][1]
            found.append(i)
    return found


def _steps(front: Sequence[tuple[float, float]]) -> str:
    """Right, then down: between two points nothing better is known than the left one."""
    (x, y), *rest = front
    return f"M{x} {y}" + "".join(f"H{x}V{y}" for x, y in rest) + f"H{WIDTH - RIGHT}"


def _place(
    label: str, x: float, y: float, taken: list[tuple[float, float, float, float]]
) -> tuple[float, float, str] | None:
    """Where a label fits beside its point without covering another, which it is then noted for; None: nowhere."""
    wide = LETTER * len(label)
    for anchor, at, dy in (
        ("start", x + 8, 4),
        ("start", x + 4, -8),
        ("end", x - 8, 4),
        ("start", x + 4, 16),
        ("end", x - 4, -8),
        ("end", x - 4, 16),
    ):
        left = at if anchor == "start" else at - wide
        box = (left, y + dy - LINE + 2, left + wide, y + dy + 3)
        inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
        if inside and not any(_overlap(box, one) for one in taken):
            taken.append(box)
            return round(at, 1), round(y + dy, 1), anchor
    return None


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _row(one: StoredFidelity, directions: Sequence[str], losses: Sequence[str], best: bool) -> FrontierRow:
    cells = [f"{one.bytes:.1f}", _plain(one.kl)]
    for direction in directions:
        if direction in losses:
            cells.append(percent(one.loss_errors.get(direction, math.nan)))
        cells.append(degrees(one.angles.get(direction, math.nan)))
    return FrontierRow(one.kind, one.label, cells, best, one.family == OWN or one.chosen)


def _term_cells(one: LossTerm) -> tuple[str, str, list[str]]:
    cells = [percent(one.loss_error), degrees(one.angle), percent(one.floor_error), degrees(one.floor_angle)]
    return one.name, one.fields, cells


def _plain(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2g}"


def percent(share: float) -> str:
    if not math.isfinite(share):
        return "–"
    return "< 0.001 %" if abs(share) < 5e-6 else f"{100 * share:+.2g} %"


def degrees(angle: float) -> str:
    return "–" if math.isnan(angle) else "< 0.01°" if angle < 0.005 else f"{angle:.2f}°"
