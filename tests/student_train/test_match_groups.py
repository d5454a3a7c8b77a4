"""Which rows are matched with which, by the layouts of both sides."""

from __future__ import annotations

import warnings

import pytest
import torch

from student_train.losses.matching import UNMATCHED
from student_train.losses.matching import match as assign
from student_train.match_groups import MOST_TEACHER_ROWS, MatchGroup, match_groups, match_rows
from teacher_cache.errors import CompatibilityError
from teacher_cache.records import ImageLayout, View

WHOLE, LEFT, RIGHT = (0, 0, 80, 40), (0, 0, 40, 40), (40, 0, 80, 40)


def image(*views: View) -> ImageLayout:
    return ImageLayout((80, 40), views)


def rows(groups: list[MatchGroup]) -> list[tuple[list[int], list[int]]]:
    return [(group.teacher.tolist(), group.student.tolist()) for group in groups]


def test_view_by_view_where_crops_agree() -> None:
    """In the student's order, whatever the teacher's; a teacher view that nobody asks for is passed over."""
    teacher = image(View(WHOLE, (2, 3)), View(LEFT, (2, 2)), View(RIGHT, (2, 2)))
    student = image(View(RIGHT, (1, 1)), View(WHOLE, (1, 2)))
    assert rows(match_groups([teacher], [student], "row 1")) == [([10, 11, 12, 13], [0]), ([0, 1, 2, 3, 4, 5], [1, 2])]


def test_whole_images_where_a_crop_has_no_partner() -> None:
    teacher = image(View(LEFT, (1, 2)), View(RIGHT, (1, 2)))
    student = image(View(WHOLE, (1, 1)), View(LEFT, (1, 1)))
    assert rows(match_groups([teacher], [student], "row 1")) == [([0, 1, 2, 3], [0, 1])]


def test_equal_crops_go_in_pairs() -> None:
    both = image(View(WHOLE, (1, 2)), View(WHOLE, (1, 1)))
    assert rows(match_groups([both], [both], "row 1")) == [([0, 1], [0, 1]), ([2], [2])]


def test_newline_tokens_are_left_out() -> None:
    teacher, student = image(View(WHOLE, (2, 3), newline=True)), image(View(WHOLE, (1, 2), newline=True))
    assert rows(match_groups([teacher], [student], "row 1")) == [([0, 1, 2, 4, 5, 6], [0, 1])]


def test_the_second_image_begins_after_the_first() -> None:
    teacher, student = image(View(WHOLE, (2, 2), newline=True)), image(View(WHOLE, (1, 1)))
    found = rows(match_groups([teacher, teacher], [student, student], "row 1"))
    assert found == [([0, 1, 3, 4], [0]), ([6, 7, 9, 10], [1])]


def test_text_only() -> None:
    assert match_groups([], [], "row 1") == []
    assert match_rows([], [], 0).shape == (0,)


def test_too_many_teacher_rows_are_thinned_evenly_and_said_once() -> None:
    """OneVision's ten views of 27 × 27, matched as one image."""
    teacher = image(*(View((i, 0, i + 1, 1), (27, 27)) for i in range(10)))
    student = image(View(WHOLE, (14, 14)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            (group,) = match_groups([teacher], [student], "row 1")
    assert len(said) == 1 and str(MOST_TEACHER_ROWS) in str(said[0].message)
    steps = group.teacher.diff()
    assert len(group.teacher) == MOST_TEACHER_ROWS and steps.min() >= 2 and steps.max() <= 3
    assert group.teacher[0] == 0 and group.teacher[-1] >= 7287


def test_thinning_leaves_enough_for_the_student() -> None:
    with pytest.warns(UserWarning, match="evenly spread"):
        (group,) = match_groups([image(View(WHOLE, (5, 5)))], [image(View(WHOLE, (4, 4)))], "row 1", most=10)
    assert len(group.teacher) == len(group.teacher.unique()) == 16


@pytest.mark.parametrize(
    "teacher, student, message",
    [
        ([image(View(WHOLE, (2, 2)))], [], "row 7: 1 images in the cache, 0 for the student"),
        ([image(View(WHOLE, (2, 2)))], [image(View(WHOLE, (3, 2)))], "row 7, image 0: 6 vision tokens of the student"),
    ],
)
def test_what_cannot_be_matched_names_the_row(teacher: list, student: list, message: str) -> None:
    with pytest.raises(CompatibilityError, match=message):
        match_groups(teacher, student, "row 7")


def test_rows_of_all_groups_together() -> None:
    """As if each group were matched alone; rows outside all groups stay unmatched."""
    costs = torch.rand(20, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = [
        MatchGroup(torch.tensor([3, 5, 7, 9]), torch.tensor([8, 0])),
        MatchGroup(torch.arange(10, 20), torch.arange(2, 6)),
    ]
    matched = match_rows((costs[g.teacher][:, g.student] for g in groups), groups, 9)
    for group in groups:
        assert matched[group.student].equal(group.teacher[assign(costs[group.teacher][:, group.student])])
    assert (matched[[1, 6, 7]] == UNMATCHED).all() and (matched[[0, 2, 3, 4, 5, 8]] >= 0).all()
