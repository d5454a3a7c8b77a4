"""EM-KD's vision token matching (VTM, arXiv 2511.21106) over a micro-batch: the teacher's side laid beside the student's rows.

The student has fewer vision tokens than the teacher. After ``Matching.align`` row j of the teacher's vision distributions, hidden states
and affinities is what stands beside vision row j of the student, so that losses compare row with row as they do for equal grids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from student_train.dataset import TrainBatch
from student_train.group_costs import column_sampled_costs, manhattan_costs
from student_train.losses.matching import UNMATCHED, hidden_cost
from student_train.losses.pooling import cell_means, cells_filled, pooled_teacher, pooling_cells
from student_train.losses.terms import StudentRows
from student_train.match_groups import MatchGroup, first_rows, match_groups, match_rows
from student_train.needs import ONE_FIELD
from student_train.teacher_view import TeacherView
from teacher_cache.records import ImageLayout

MATCHINGS = ("hungarian-logits", "hungarian-hidden", "pool")


@dataclass(frozen=True)
class Matching:
    """How vision rows find their teacher rows; without gradient, anew in every step.

    Attributes:
        by: ``hungarian-logits``, ``hungarian-hidden`` (through the learned map ``map_name``), or ``pool`` (no assignment: the teacher's
            rows of a student row's cell, averaged).
        cost: ``logits`` or ``probs``. columns: of a sampled cost, one draw for all images of a micro-batch; 0: the exact cost.
        most: teacher rows of one assignment.
    """

    by: str
    cost: str
    columns: int
    most: int
    map_name: str

    def check_layouts(self, place: str, teacher: Sequence[ImageLayout], student: Sequence[ImageLayout]) -> None:
        """CompatibilityError where a row's vision tokens cannot be matched, before any step is spent on it."""
        if self.by == "pool":
            pooling_cells(teacher, student, place)
        else:
            match_groups(teacher, student, place, self.most)

    def counts(self, batch: TrainBatch) -> list[int]:
        """Vision rows of each sample that get a teacher row: all but newlines."""
        return [
            sum(view.grid[0] * view.grid[1] for image in one for view in image.views) for one in batch.student_layouts
        ]

    def align(
        self, view: TeacherView, student: StudentRows, batch: TrainBatch, generator: torch.Generator
    ) -> TeacherView:
        """The teacher's side with its vision rows beside the student's; ``matched`` says which rows have one.

        Args:
            view: rows ``[R_t]`` of all samples. student: vision rows ``[R_s]``. generator: of the CPU, for sampled columns.
        """
        with torch.no_grad():
            if self.by == "pool":
                return self._pooled(view, student, batch)
            return self._assigned(view, student, batch, generator)

    def _assigned(
        self, view: TeacherView, student: StudentRows, batch: TrainBatch, generator: torch.Generator
    ) -> TeacherView:
        counts, starts = list(student.counts["vision"]), first_rows(batch.layouts)
        whole = self.match(view, student, batch, generator).to(student.head.device)
        found = whole.clamp_min(0)
        inside = [(one - start).clamp_min(0) for one, start in zip(whole.split(counts), starts)]
        return replace(
            view,
            distributions={kind: d[found] if kind == "vision" else d for kind, d in view.distributions.items()},
            hidden={kind: h[found] if kind == "vision" else h for kind, h in view.hidden.items()},
            of_samples=beside(view, lambda one, number: one[inside[number]]),
            matched=list((whole != UNMATCHED).split(counts)),
        )

    def match(
        self, view: TeacherView, student: StudentRows, batch: TrainBatch, generator: torch.Generator
    ) -> torch.Tensor:
        """Teacher row of every vision row, both counted over the whole micro-batch, int64 ``[R_s]`` (``UNMATCHED`` for newlines)."""
        hidden = student.hidden["vision"].detach()
        groups = self._groups(batch)
        if self.by == "hungarian-hidden":
            costs = self._costs_of_hidden(view, student, hidden, groups)
        else:
            costs = self._costs_of_logits(view, student, hidden, groups, generator)
        return match_rows(costs, groups, len(hidden))

    def _groups(self, batch: TrainBatch) -> list[MatchGroup]:
        """What is matched with each other, in rows of the whole micro-batch."""
        sides = zip(batch.layouts, batch.student_layouts, batch.batch.keys)
        starts = zip(first_rows(batch.layouts), first_rows(batch.student_layouts))
        return [
            group.after(*at)
            for (theirs, ours, key), at in zip(sides, starts)
            for group in match_groups(theirs, ours, key, self.most)
        ]

    def _costs_of_logits(
        self,
        view: TeacherView,
        student: StudentRows,
        hidden: torch.Tensor,
        groups: Sequence[MatchGroup],
        generator: torch.Generator,
    ) -> Iterator[torch.Tensor]:
        assert view.raw_vision is not None, "the method did not declare this need (vision_raw_logits)"
        sides = view.raw_vision, hidden, student.head.detach(), groups
        if self.columns:
            return column_sampled_costs(*sides, self.columns, generator, student.cap)
        return manhattan_costs(*sides, self.cost, student.cap)

    def _costs_of_hidden(
        self, view: TeacherView, student: StudentRows, hidden: torch.Tensor, groups: Sequence[MatchGroup]
    ) -> Iterator[torch.Tensor]:
        assert "vision" in view.hidden, "the method did not declare this need (vision_hidden)"
        assert student.maps, "hidden states of two widths need the method's map"
        mapped, theirs = student.maps[self.map_name](hidden.to(torch.float32)), view.hidden["vision"]
        return (hidden_cost(theirs[g.teacher.to(mapped.device)], mapped[g.student.to(mapped.device)]) for g in groups)

    def _pooled(self, view: TeacherView, student: StudentRows, batch: TrainBatch) -> TeacherView:
        """The means of the teacher's rows in every student row's cell: of raw logits, hidden states and cosines."""
        sides = zip(batch.batch.keys, batch.layouts, batch.student_layouts)
        device, counts = student.head.device, student.counts["vision"]
        cells = [pooling_cells(theirs, ours, key).to(device) for key, theirs, ours in sides]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        whole = torch.cat([torch.where(one == UNMATCHED, one, one + start) for one, start in zip(cells, starts)])
        total = sum(counts)
        return replace(
            view,
            distributions={
                kind: pooled_teacher(d, whole, total) if kind == "vision" else d
                for kind, d in view.distributions.items()
            },
            hidden={kind: cell_means(h, whole, total) if kind == "vision" else h for kind, h in view.hidden.items()},
            of_samples=beside(view, lambda one, number: cell_means(one, cells[number], counts[number])),
            matched=[cells_filled(one, count) for one, count in zip(cells, counts)],
        )


def beside(view: TeacherView, move: Callable[[torch.Tensor, int], torch.Tensor]) -> dict[str, Sequence[torch.Tensor]]:
    """``of_samples`` with the student's vision tokens. move: (``[R_t, …]`` flattened to two axes, number of the sample) → ``[R_s, …]``."""
    found = dict(view.of_samples)
    for need, each in view.of_samples.items():
        axis = ONE_FIELD[need].vision_axis
        if axis is None:
            continue
        rows = [one.movedim(axis, 0) for one in each]
        moved = [move(one.flatten(1) if one.ndim > 1 else one[:, None], number) for number, one in enumerate(rows)]
        found[need] = [
            new.reshape(len(new), *old.shape[1:]).movedim(0, axis) for new, old in zip(moved, rows, strict=True)
        ]
    return found
