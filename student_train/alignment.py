"""EM-KD's vision token matching (VTM, arXiv 2511.21106) over a micro-batch: the teacher's side laid beside the student's rows.

The student has fewer vision tokens than the teacher. After ``Matching.align`` row j of the teacher's vision distributions, hidden states
and affinities is what stands beside vision row j of the student, so that losses compare row with row as they do for equal grids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from student_train.losses.matching import UNMATCHED, column_sampled_cost, hidden_cost, manhattan_cost
from student_train.losses.pooling import cell_means, cells_filled, pooled_teacher, pooling_cells
from student_train.losses.terms import StudentRows
from student_train.match_groups import match_groups, match_rows
from student_train.stream import TrainBatch
from student_train.teacher_view import TeacherView
from teacher_cache.records import ImageLayout

MATCHINGS = ("hungarian-logits", "hungarian-hidden", "pool")
Cost = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Matching:
    """How vision rows find their teacher rows; without gradient, anew in every step.

    Attributes:
        by: ``hungarian-logits``, ``hungarian-hidden`` (through the learned map ``map_name``), or ``pool`` (no assignment: the teacher's
            rows of a student row's cell, averaged).
        cost: ``logits`` or ``probs``. columns: of a sampled cost; 0: the exact one. most: teacher rows of one assignment.
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
        device = student.head.device
        rows = [self.match(number, view, student, batch, generator).to(device) for number in range(len(batch.layouts))]
        starts = first_rows(batch.layouts)
        whole = torch.cat([one.clamp_min(0) + start for one, start in zip(rows, starts)])
        return replace(
            view,
            distributions={kind: d[whole] if kind == "vision" else d for kind, d in view.distributions.items()},
            hidden={kind: h[whole] if kind == "vision" else h for kind, h in view.hidden.items()},
            affinities=view.affinities
            and [one[matched.clamp_min(0)] for one, matched in zip(view.affinities, rows, strict=True)],
            matched=[one != UNMATCHED for one in rows],
        )

    def match(
        self, number: int, view: TeacherView, student: StudentRows, batch: TrainBatch, generator: torch.Generator
    ) -> torch.Tensor:
        """Teacher row of every vision row of one sample, int64 ``[N_s]`` (``UNMATCHED`` for newlines)."""
        hidden = student.of_sample("vision", number).detach()
        groups = match_groups(batch.layouts[number], batch.student_layouts[number], batch.batch.keys[number], self.most)
        cost = self._cost_of_hidden if self.by == "hungarian-hidden" else self._cost_of_logits
        return match_rows(cost(number, view, student, batch, hidden, generator), groups, len(hidden))

    def _cost_of_logits(
        self,
        number: int,
        view: TeacherView,
        student: StudentRows,
        batch: TrainBatch,
        hidden: torch.Tensor,
        generator: torch.Generator,
    ) -> Cost:
        assert view.raw_vision is not None, "the method did not declare this need (vision_raw_logits)"
        teacher, head = view.raw_vision[number], student.head.detach()

        def cost(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
            device = hidden.device
            if self.columns:
                rows = teacher[theirs.to(device)], hidden[ours.to(device)]
                return column_sampled_cost(*rows, head, self.columns, generator, self.cost)
            return manhattan_cost(teacher[theirs.to(device)], hidden[ours.to(device)], head, self.cost)

        return cost

    def _cost_of_hidden(
        self,
        number: int,
        view: TeacherView,
        student: StudentRows,
        batch: TrainBatch,
        hidden: torch.Tensor,
        generator: torch.Generator,
    ) -> Cost:
        assert "vision" in view.hidden, "the method did not declare this need (vision_hidden)"
        assert student.maps, "hidden states of two widths need the method's map"
        mapped = student.maps[self.map_name](hidden.to(torch.float32))
        start = first_rows(batch.layouts)[number]

        def cost(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
            return hidden_cost(view.hidden["vision"][start + theirs.to(mapped.device)], mapped[ours.to(mapped.device)])

        return cost

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
            affinities=view.affinities
            and [cell_means(*one) for one in zip(view.affinities, cells, counts, strict=True)],
            matched=[cells_filled(one, count) for one, count in zip(cells, counts)],
        )


def first_rows(layouts: Sequence[Sequence[ImageLayout]]) -> list[int]:
    """The first vision row of every sample among those of all."""
    counts = [sum(image.tokens() for image in one) for one in layouts]
    return [sum(counts[:i]) for i in range(len(counts))]
