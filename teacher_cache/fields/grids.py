"""Where a row's vision tokens lie in space, as codecs want it."""

from __future__ import annotations

from collections.abc import Sequence

from teacher_cache.codecs.spectrum import Grid
from teacher_cache.records import ImageLayout, TeacherOutput


def vision_grids(layout: Sequence[ImageLayout], rows: int) -> tuple[Grid, ...]:
    """One grid a view among the ``rows`` vision rows of a sample; none where the layout does not account for all of them."""
    views = [view for image in layout for view in image.views]
    if sum(view.tokens() for view in views) != rows:
        return ()
    grids, first = [], 0
    for view in views:
        height, width = view.grid
        grids.append(Grid(first, height, width, width + view.newline))
        first += view.tokens()
    return tuple(grids)


def grids_of(output: TeacherOutput, kind: str) -> tuple[Grid, ...]:
    """Of a teacher's vision rows; response rows lie on no grid."""
    return vision_grids(output.layout, len(output.hidden["vision"])) if kind == "vision" else ()


def grids_of_all(outputs: Sequence[TeacherOutput], kind: str, counts: Sequence[int]) -> list[Grid]:
    """Grids of several samples among their concatenated rows, ``counts`` rows each."""
    grids, first = [], 0
    for output, count in zip(outputs, counts):
        grids += [grid._replace(first=grid.first + first) for grid in grids_of(output, kind)]
        first += count
    return grids
