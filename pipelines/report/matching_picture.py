"""A matching of vision tokens over its image, as geometry: equal colours belong together, lines go from own place to match."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.report.picture import MAX_PIXELS, data_uri
from teacher_cache.records import Image, ImageLayout
from teacher_cache.sources.usable_samples import decode_image

WIDTH = 480
MOST_NUMBERED = 49
"""Student tokens that are numbered on both sides; more of them would be too small to read."""
ON_PLACE = 0.5 + 1e-9
"""Cells from centre to centre within which a match lies in the token's own cell."""


@dataclass(frozen=True)
class PictureToken:
    """A patch of a vision grid in pixels of the image: view, grid row and column, left, top, width, height."""

    view: int
    row: int
    column: int
    left: float
    top: float
    width: float
    height: float

    @property
    def centre(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.top + self.height / 2


Pairs = Sequence[tuple[PictureToken, PictureToken]]
"""(student's token, teacher's token)"""


@dataclass(frozen=True)
class Patch:
    """A drawn patch. colour: of CSS, "" where no token of the student is matched with it."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    number: str
    told: str


@dataclass(frozen=True)
class MatchedPicture:
    """One image: both sides' patches, lines as SVG path data, and how far the matches are from their tokens' own places.

    Attributes:
        share, distance: of the tokens whose match lies within one cell of their own place, and cells on average; any_share,
            any_distance: the same of a blind matching.
        font: size of the numbers on the teacher's side, and on the student's.
    """

    key: str
    source: str
    width: int
    height: float
    teacher: list[Patch]
    student: list[Patch]
    lines: list[str]
    tokens: int
    teacher_tokens: int
    share: float
    distance: float
    any_share: float
    any_distance: float
    font: tuple[float, float]

    @property
    def told(self) -> str:
        return (
            f"{self.tokens} vision tokens of the student matched with {self.teacher_tokens} of the teacher: "
            f"{100 * self.share:.0f} % lie within one cell of their own place, {self.distance:.1f} cells away on average"
        )


def tokens_of(layout: ImageLayout) -> dict[int, PictureToken]:
    """Vision row of the image → its patch; newline tokens have no place."""
    found, first = {}, 0
    for number, view in enumerate(layout.views):
        left, top, right, bottom = view.crop
        width, height = (right - left) / view.grid[1], (bottom - top) / view.grid[0]
        for row, column, at in view.places():
            place = left + column * width, top + row * height
            found[first + at] = PictureToken(number, row, column, *place, width, height)
        first += view.tokens()
    return found


def local_share(pairs: Pairs) -> float:
    """Share of the student's tokens whose match is at most one of its own cells aside, and one above or below, centre from centre."""
    near = [max(map(abs, apart(one))) <= 1 + 1e-9 for one in pairs]
    return sum(near) / len(near) if near else math.nan


def mean_distance(pairs: Pairs) -> float:
    """In cells of the student."""
    return sum(math.hypot(*apart(one)) for one in pairs) / len(pairs) if pairs else math.nan


def apart(pair: tuple[PictureToken, PictureToken]) -> tuple[float, float]:
    """(columns, rows) of the student's grid from a token to its match."""
    (x, y), (to_x, to_y) = pair[0].centre, pair[1].centre
    return (to_x - x) / pair[0].width, (to_y - y) / pair[0].height


def draw_matching(
    image: Image, student: ImageLayout, teacher: ImageLayout, pairs: Pairs, key: str, upright: bool = True
) -> MatchedPicture:
    """The student's first view, and what its tokens are matched with.

    Args:
        pairs: of all the image's tokens; those of further views (tiles) are left out.
        upright: whether the image's EXIF orientation was applied.
    """
    ours = [one for one in tokens_of(student).values() if one.view == 0]
    theirs = list(tokens_of(teacher).values())
    shown = [one for one in pairs if one[0].view == 0]
    blind = [(a, b) for a in ours for b in theirs]
    view = student.views[0]
    left, top, right, bottom = view.crop
    scale = WIDTH / (right - left)
    numbers = {one: str(i) for i, one in enumerate(ours, start=1)} if len(ours) <= MOST_NUMBERED else {}
    owner = {b: a for a, b in shown}

    def patch(one: PictureToken, token: PictureToken | None, told: str) -> Patch:
        x, y = (one.left - left) * scale, (one.top - top) * scale
        size = round(one.width * scale, 1), round(one.height * scale, 1)
        colour = _colour(token, view.grid) if token else ""
        return Patch(round(x, 1), round(y, 1), *size, colour, numbers.get(token, "") if token else "", told)

    # Where views overlap (tiles over a whole image), the free ones would hide the matched ones, so these are drawn last.
    theirs.sort(key=lambda one: one in owner)
    behind = {b.view for _, b in shown} or {0}
    return MatchedPicture(
        key=key,
        source=data_uri(decode_image(image, MAX_PIXELS, upright).crop(view.crop)),
        width=WIDTH,
        height=round((bottom - top) * scale, 1),
        teacher=[patch(one, owner.get(one), _told(owner.get(one), one)) for one in theirs if one.view in behind],
        student=[patch(a, a, _told(a, b)) for a, b in shown],
        lines=[_line(one, (left, top), scale) for one in shown if max(map(abs, apart(one))) > ON_PLACE],
        tokens=len(shown),
        teacher_tokens=len(theirs),
        share=local_share(shown),
        distance=mean_distance(shown),
        any_share=local_share(blind),
        any_distance=mean_distance(blind),
        font=(round(0.42 * min(theirs[0].width, theirs[0].height) * scale, 1), round(0.36 * ours[0].height * scale, 1)),
    )


def _colour(token: PictureToken, grid: tuple[int, int]) -> str:
    """By place: the hue turns with the column, the lightness grows with the row."""
    rows, columns = grid
    hue = 300 * (token.column / max(1, columns - 1))
    light = 38 + 36 * (token.row / max(1, rows - 1))
    return f"hsl({hue:.0f},90%,{light:.0f}%)"


def _told(ours: PictureToken | None, theirs: PictureToken) -> str:
    place = f"teacher's row {theirs.row + 1}, column {theirs.column + 1}"
    if ours is None:
        return f"{place}: matched with none"
    distance = math.hypot(*apart((ours, theirs)))
    return f"student's row {ours.row + 1}, column {ours.column + 1}: {place}, {distance:.1f} cells away"


def _line(pair: tuple[PictureToken, PictureToken], start: tuple[float, float], scale: float) -> str:
    (x, y), (to_x, to_y) = (
        ((a - start[0]) * scale, (b - start[1]) * scale) for a, b in (pair[0].centre, pair[1].centre)
    )
    return f"M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}"
