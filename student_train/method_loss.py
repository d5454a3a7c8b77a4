"""A method's loss of the micro-batches of one optimizer step: what ``Trainer`` sums, and what loops of other people may."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from student_train.config import TrainSettings
from student_train.dataset import TrainBatch
from student_train.distributed import Processes
from student_train.distributions import DenseTeacher
from student_train.losses.counted import Weights
from student_train.losses.reduce import total_loss
from student_train.losses.terms import Terms, kinds_of
from student_train.methods import Method, Passes, hook
from student_train.step_rows import StepRows, Weigh, count_step
from student_train.student import RowForward
from student_train.teacher_view import TeacherView
from teacher_cache.preparing.batch import Batch

SeeTeacher = Callable[[TrainBatch], TeacherView]


@dataclass
class MethodLoss:
    """``rows_of`` counts the rows of a step, ``loss_of`` gives one micro-batch's share of the step's loss; the shares of all add up.

    Args:
        model: the student. see_teacher: micro-batch → the teacher's side of it.
        settings: of them ``bf16`` and ``use_liger_kernel`` are read here. processes: whose micro-batches make the step.
        weigh: micro-batch → how much its rows count, by term.
    """

    model: RowForward
    method: Method
    see_teacher: SeeTeacher
    settings: TrainSettings
    processes: Processes
    weigh: Weigh = field(default=lambda one: {}, kw_only=True)

    def __post_init__(self) -> None:
        self.network: torch.nn.Module = self.model
        """What is called in training steps: the student, or DDP's copy of it."""
        self.terms: Terms = self.method.terms()
        self.matching = hook(self.method, "alignment")()
        self.kinds = sorted(kinds_of(self.terms) | ({"vision"} if self.matching else set()))

    def rows_of(self, step: int, batches: Sequence[TrainBatch]) -> StepRows:
        """How the rows of a step count, by the cache alone. All processes call it."""
        return count_step(batches, self.terms, self.weigh, self._counts, self.processes)

    def _counts(self, one: TrainBatch) -> dict[str, Sequence[int]]:
        """Rows of each sample that can count: vision rows that a matching leaves out do not."""
        counts: dict[str, Sequence[int]] = dict(one.batch.counts)
        return counts | {"vision": self.matching.counts(one)} if self.matching else counts

    def loss_of(
        self,
        one: TrainBatch,
        progress: float,
        terms: Terms,
        generator: torch.Generator,
        denominators: Mapping[str, float],
        weights: Weights,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The method's loss of one micro-batch, and each term's share of it.

        Args:
            progress: share of the stage's steps that are made, from 0 on. generator: of the method's draws, on the CPU.
            denominators, weights: of ``rows_of``.
        """
        passes = hook(self.method, "passes")(progress, generator) or Passes()
        batch = one.batch.to(self.processes.device)
        view = self.see_teacher(one)
        if passes.self_teacher:
            view = replace(view, self_teacher=self._own_words(batch, passes))
        with self._autocast():
            hidden = self.network(batch, self.kinds, passes.student)
        student = self.model.rows(hidden, batch, one.student_text)
        if self.matching:
            view = self.matching.align(view, student, one, generator)
        liger = self.settings.use_liger_kernel
        loss, values = total_loss(terms, student, view, denominators, liger, weights)
        if len(terms) < len(self.terms):
            # Without a row of the term, too, layers run back whose shards the other processes wait for.
            loss = loss + sum(0.0 * one.sum() for one in hidden.values() if isinstance(one, torch.Tensor))
        return loss, values

    @torch.no_grad()
    def _own_words(self, batch: Batch, passes: Passes) -> dict[str, DenseTeacher]:
        """What the student's weights say in the pass that teaches, by row kind; past DDP, which waits for a backward pass."""
        with self._autocast():
            hidden = self.model(batch, self.kinds, passes.teacher)
        head = self.model.head.detach()
        return {kind: DenseTeacher(rows, head, self.model.form.cap) for kind, rows in hidden.items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.settings.bf16:
            return nullcontext()
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16)
