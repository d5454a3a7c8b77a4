"""Which vision rows of teacher and student may be matched with each other: those of one view where the crops agree, else of one image."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from student_train.losses.matching import UNMATCHED, match
from teacher_cache.errors import CompatibilityError
from teacher_cache.records import ImageLayout, View

MOST_TEACHER_ROWS = 2916
"""Teacher rows of one group: four views of 27 × 27. OneVision reaches 7,290 an image, and the assignment grows with their cube."""
CAP_WARNING = "some images have more teacher vision tokens than the matching takes ({} a group): an evenly spread subset of them is matched"


@dataclass(frozen=True)
class MatchGroup:
    """Rows of one sample that are matched with each other, newline tokens left out.

    Attributes:
        teacher: int64 ``[G_t]``, student: int64 ``[G_s]``: row numbers inside the sample's vision rows, G_t ≥ G_s.
    """

    teacher: torch.Tensor
    student: torch.Tensor

    def after(self, teacher: int, student: int) -> MatchGroup:
        """The same rows, counted from so many rows before them."""
        return MatchGroup(self.teacher + teacher, self.student + student)


def match_groups(
    teacher: Sequence[ImageLayout], student: Sequence[ImageLayout], place: str, most: int = MOST_TEACHER_ROWS
) -> list[MatchGroup]:
    """The groups of one sample, image after image.

    An image is matched view by view where every student view has a teacher view of the same crop (teacher views beyond these are not
    used), else as a whole. More than ``most`` teacher rows of a group are thinned evenly, which is said once a process.

    Args:
        place: names the row in errors.

    Raises:
        CompatibilityError: not the same number of images, or fewer teacher rows than student rows in a group.
    """
    if len(teacher) != len(student):
        raise CompatibilityError(f"{place}: {len(teacher)} images in the cache, {len(student)} for the student")
    groups, firsts = [], (0, 0)
    for number, (theirs, ours) in enumerate(zip(teacher, student)):
        rows = _view_rows(theirs, firsts[0]), _view_rows(ours, firsts[1])
        for of_teacher, of_student in _pairs(theirs.views, ours.views):
            group = MatchGroup(torch.cat([rows[0][i] for i in of_teacher]), torch.cat([rows[1][i] for i in of_student]))
            groups.append(_checked(group, most, f"{place}, image {number}"))
        firsts = firsts[0] + theirs.tokens(), firsts[1] + ours.tokens()
    return groups


def match_rows(costs: Iterable[torch.Tensor], groups: Sequence[MatchGroup], student_rows: int) -> torch.Tensor:
    """The teacher row of every student row, int64 ``[student_rows]`` on the CPU; ``UNMATCHED`` outside all groups.

    Args:
        costs: ``[G_t, G_s]`` of every group, as ``group_costs`` makes them.
    """
    matched = torch.full((student_rows,), UNMATCHED, dtype=torch.int64)
    for group, cost in zip(groups, costs, strict=True):
        matched[group.student] = group.teacher[match(cost.cpu())]
    return matched


def first_rows(layouts: Sequence[Sequence[ImageLayout]]) -> list[int]:
    """The first vision row of every sample among those of all."""
    counts = [sum(image.tokens() for image in one) for one in layouts]
    return [sum(counts[:i]) for i in range(len(counts))]


def _view_rows(layout: ImageLayout, first: int) -> list[torch.Tensor]:
    """Row numbers of every view's patches; the image's rows begin at ``first``."""
    rows = []
    for view in layout.views:
        height, width = view.grid
        numbers = torch.arange(height)[:, None] * (width + view.newline) + torch.arange(width)
        rows.append(first + numbers.flatten())
        first += view.tokens()
    return rows


def _pairs(teacher: Sequence[View], student: Sequence[View]) -> list[tuple[list[int], list[int]]]:
    """(teacher views, student views) that go together; equal crops of one side are taken in order."""
    free = list(range(len(teacher)))
    pairs = []
    for number, view in enumerate(student):
        found = next((i for i in free if teacher[i].crop == view.crop), None)
        if found is None:
            return [(list(range(len(teacher))), list(range(len(student))))]
        free.remove(found)
        pairs.append(([found], [number]))
    return pairs


def _checked(group: MatchGroup, most: int, place: str) -> MatchGroup:
    count, needed = len(group.teacher), len(group.student)
    if count < needed:
        raise CompatibilityError(
            f"{place}: {needed} vision tokens of the student to match with {count} of the teacher: "
            "compress the student's further, or choose a method whose rows are aligned"
        )
    if count <= most:
        return group
    warnings.warn(CAP_WARNING.format(most), stacklevel=3)
    kept = max(most, needed)
    return MatchGroup(group.teacher[torch.arange(kept) * count // kept], group.student)
