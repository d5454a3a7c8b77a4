"""The matching without an assignment: each student row against the mean of the teacher rows in its cell (``pool`` in EM-KD's ablation).

What is averaged are the teacher's raw logits, that is its hidden states before the head, which is linear; not its probabilities. A
pooled hidden state is what a teacher with average-pooled tokens would hand to its head, and costs no more than one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from student_train.distributions import DenseTeacher, Distribution, FullVocabulary, HeadAndSketch, SketchTeacher
from student_train.losses.matching import UNMATCHED
from teacher_cache.errors import CompatibilityError
from teacher_cache.records import ImageLayout, View
from teacher_cache.signal_records import Sketch


def pooling_cells(teacher: Sequence[ImageLayout], student: Sequence[ImageLayout], place: str) -> torch.Tensor:
    """The student row in whose cell each teacher row of one sample lies, int64 ``[N_t]``; −1 (``UNMATCHED``) for newline tokens.

    Raises:
        CompatibilityError: other images, views or crops on both sides, or a grid that the student's does not divide; names ``place``.
    """
    sides = [[view for image in side for view in image.views] for side in (teacher, student)]
    crops = [[[view.crop for view in image.views] for image in side] for side in (teacher, student)]
    if crops[0] != crops[1]:
        raise CompatibilityError(f"{place}: teacher and student see other views of its images: pooling needs the same")
    cells, first = [], 0
    for theirs, ours in zip(*sides):
        cells.append(_view_cells(theirs, ours, first, place))
        first += ours.tokens()
    return torch.cat(cells) if cells else torch.zeros(0, dtype=torch.int64)


def _view_cells(teacher: View, student: View, first: int, place: str) -> torch.Tensor:
    (tall, wide), (rows, columns) = teacher.grid, student.grid
    if tall % rows or wide % columns:
        raise CompatibilityError(
            f"{place}: a grid of {tall} × {wide} vision tokens does not fall into {rows} × {columns} equal cells: "
            "match on logits or hidden states instead of pool"
        )
    cells = torch.full((teacher.tokens(),), UNMATCHED, dtype=torch.int64)
    step = columns + student.newline
    for row, column, number in teacher.places():
        cells[number] = first + row * rows // tall * step + column * columns // wide
    return cells


def pooled_teacher(teacher: Distribution, cells: torch.Tensor, student_rows: int) -> FullVocabulary:
    """The teacher's mean logits of every student row's cell, rows ``[N_s]``; a row without a cell (newline) is all zeros, of no meaning.

    A sketch is pooled by its coefficients and mean logits. So is the sketch of a composed teacher (``HeadAndSketch``), whose exact
    log-probs are left out: they are of single rows, and the likeliest tokens of a mean are not known from them.

    Args:
        teacher: rows ``[N_t]``. cells: ``[N_t]`` of ``pooling_cells``.

    Raises:
        CompatibilityError: a top-k or sampled teacher, whose logits are not known.
    """
    if isinstance(teacher, DenseTeacher):
        return DenseTeacher(cell_means(teacher.hidden, cells, student_rows), teacher.head)
    if isinstance(teacher, SketchTeacher | HeadAndSketch):
        sketch = teacher.sketch
        coefficients = cell_means(sketch.coefficients, cells, student_rows)
        mean_logit = cell_means(sketch.mean_logit[:, None], cells, student_rows)[:, 0]
        return SketchTeacher(Sketch(coefficients, mean_logit), teacher.head)
    raise CompatibilityError(
        "pooling the teacher's vision rows needs their logits: capture vision_hidden (a top-k field has single rows only)"
    )


def cells_filled(cells: torch.Tensor, student_rows: int) -> torch.Tensor:
    """bool ``[student_rows]``: the rows that have a cell, and so a pooled teacher row."""
    filled = torch.zeros(student_rows, dtype=torch.bool, device=cells.device)
    filled[cells[cells != UNMATCHED]] = True
    return filled


def cell_means(values: torch.Tensor, cells: torch.Tensor, count: int) -> torch.Tensor:
    """Mean over the rows of each cell ``[count, …]``, summed in float32."""
    cells = cells.to(values.device)
    inside = cells != UNMATCHED
    sums = values.new_zeros(count, values.shape[1], dtype=torch.float32)
    sums.index_add_(0, cells[inside], values[inside].to(torch.float32))
    sizes = torch.bincount(cells[inside], minlength=count).clamp_min(1)
    return sums.div_(sizes[:, None]).to(values.dtype)
