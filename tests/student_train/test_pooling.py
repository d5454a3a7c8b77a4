"""Pooled teacher rows against the mean of the logits of their cell."""

from __future__ import annotations

import pytest
import torch

from student_train.distributions import DenseTeacher, HeadAndSketch, HeadAndTail, SketchTeacher
from student_train.losses.pooling import cells_filled, pooled_teacher, pooling_cells
from teacher_cache.errors import CompatibilityError
from teacher_cache.models.head import topk_rows
from teacher_cache.models.low_rank import LowRankHead
from teacher_cache.records import ImageLayout, View
from teacher_cache.signal_records import Sketch

V, D = 50, 7
CROP = (0, 0, 60, 40)


def layout(*grids: tuple[int, int], newline: bool = False) -> list[ImageLayout]:
    return [ImageLayout((60, 40), (View(CROP, grid, newline),)) for grid in grids]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_cells() -> None:
    assert pooling_cells(layout((4, 4)), layout((2, 2)), "row 1").reshape(4, 4).tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [2, 2, 3, 3],
        [2, 2, 3, 3],
    ]
    assert pooling_cells(layout((2, 3), (1, 2)), layout((1, 3), (1, 1)), "row 1").tolist() == [0, 1, 2, 0, 1, 2, 3, 3]
    assert pooling_cells(layout(), layout(), "row 1").shape == (0,)


def test_newline_tokens_belong_to_no_cell() -> None:
    cells = pooling_cells(layout((2, 2), newline=True), layout((2, 1), newline=True), "row 1")
    assert cells.tolist() == [0, 0, -1, 2, 2, -1]
    assert cells_filled(cells, 4).tolist() == [True, False, True, False]


def test_average_pooling_of_the_hidden_grid() -> None:
    """The same as ``torch``'s average pooling of the teacher's tokens before its head."""
    hidden, head = draw(24, D), draw(V, D)
    cells = pooling_cells(layout((4, 6)), layout((2, 3)), "row 1")
    pooled = pooled_teacher(DenseTeacher(hidden, head), cells, 6)
    grid = torch.nn.functional.avg_pool2d(hidden.T.reshape(1, D, 4, 6), 2).reshape(D, 6).T
    torch.testing.assert_close(pooled.logits(), grid @ head.T)


@pytest.mark.parametrize("form", ["dense", "bf16", "sketch", "head and sketch"])
def test_logits_are_averaged(form: str) -> None:
    hidden, weight, centre = draw(12, D), draw(V, D), draw(V)
    sketched = SketchTeacher(Sketch(hidden, draw(12)), LowRankHead(weight, centre))
    teacher = {
        "dense": DenseTeacher(hidden, weight),
        "bf16": DenseTeacher(hidden.bfloat16(), weight.bfloat16()),
        "sketch": sketched,
        "head and sketch": HeadAndSketch(topk_rows(hidden, weight, 4), sketched.sketch, sketched.head),
    }[form]
    cells = pooling_cells(layout((3, 4)), layout((1, 2)), "row 1")
    pooled = pooled_teacher(teacher, cells, 2)
    single = sketched.logits() if form == "head and sketch" else teacher.logits()
    expected = torch.stack([single[cells == i].mean(dim=0) for i in range(2)])
    tolerance = {"rtol": 0.02, "atol": 0.05} if form == "bf16" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(pooled.logits(), expected, **tolerance)
    assert len(pooled) == 2 and pooled.log_probs().exp().sum(dim=1).allclose(torch.ones(2), atol=1e-4)


def test_only_what_has_logits() -> None:
    with pytest.raises(CompatibilityError, match="capture vision_hidden"):
        pooled_teacher(HeadAndTail(topk_rows(draw(4, D), draw(V, D), 3), V), torch.zeros(4, dtype=torch.int64), 1)


def test_grids_must_divide_and_views_agree() -> None:
    with pytest.raises(CompatibilityError, match=r"row 3: a grid of 4 × 4 .* 3 × 3 equal cells"):
        pooling_cells(layout((4, 4)), layout((3, 3)), "row 3")
    with pytest.raises(CompatibilityError, match=r"row 3: .* other views"):
        pooling_cells(layout((4, 4)), [ImageLayout((60, 40), (View((0, 0, 30, 40), (2, 2)),))], "row 3")
