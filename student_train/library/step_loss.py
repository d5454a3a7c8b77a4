"""The whole loss of any method on the batches of one optimizer step, for loops of other people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from student_train.config import TrainSettings
from student_train.dataset import TrainBatch
from student_train.distributed import Processes, spread, summed_loss, summing
from student_train.draws import draw_seed
from student_train.learned_maps import learned_maps
from student_train.library.collator import whole_batch
from student_train.library.dataset import CacheDataset, processes
from student_train.losses.terms import FIRST_LAYER, Terms
from student_train.method_loss import MethodLoss
from student_train.step_rows import StepRows
from student_train.student import RowForward
from teacher_cache.errors import KdcliError


class StepLoss:
    """The loss of a dataset's method, as ``kdcli train-student`` has it: means run over all rows of the optimizer step.

    ``for loss in step_loss(batches, step): loss.backward()`` leaves the gradients of one step, whatever it is cut into.

    Args:
        student: the model, or a ``PeftModel``; what of it trains is the caller's choice (``requires_grad``).
        rows: a dataset that a method was asked of.
        bf16: autocast the student's forward. use_liger_kernel: as in ``[train]``.
        seed: of the method's draws. total_steps: of the run, for methods that change over it.
    Attributes:
        module: the student and the method's learned maps: what an optimizer is to train.

    Raises:
        KdcliError: no method was asked for; it changes over the run, and its length is not said; the head has an adapter.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        rows: CacheDataset,
        *,
        bf16: bool = False,
        use_liger_kernel: bool = False,
        seed: int = 0,
        total_steps: int = 0,
    ):
        method, request = rows.request.method, rows.request
        if method is None:
            raise KdcliError("the dataset was made for needs, not for a method: cache.dataset(method=…)")
        if hasattr(method, "passes") and not total_steps:
            raise KdcliError(f"method {request.name} changes over the run: say how long it is, total_steps=…")
        self.seed, self.total_steps = seed, total_steps
        whole: Any = student
        base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole  # in which PEFT put its adapters
        if type(base.get_output_embeddings()).__module__.startswith("peft."):
            raise KdcliError(
                "the student's head has an adapter, and losses read the head's own weight: leave lm_head out of target_modules "
                "and modules_to_save"
            )
        self.module = RowForward(base, learned_maps(rows.cache, request.served, method, request.name, seed, base))
        device = next(student.parameters()).device
        self.module.to(device)
        settings = TrainSettings(bf16=bf16, use_liger_kernel=use_liger_kernel, report_to="none")
        here = Processes(*processes(), device)
        self._loss = MethodLoss(self.module, method, self._see, settings, here)
        layers_stay = bool(FIRST_LAYER & set(self._loss.kinds)) or hasattr(method, "passes")
        self._loss.network = spread(self.module, here, False, bf16, layers_stay)
        self._source, self._device = rows.source, device

    def _see(self, one: TrainBatch) -> Any:
        return self._source.heads(self._device).view(one)

    @property
    def terms(self) -> Terms:
        """Of the method, by name."""
        return self._loss.terms

    @property
    def network(self) -> torch.nn.Module:
        """``module``; under several processes DistributedDataParallel around it."""
        return self._loss.network

    def __call__(self, batches: Sequence[Mapping[str, Any]], step: int = 0) -> Iterator[torch.Tensor]:
        """Each batch's share of the step's loss, a scalar, in turn; run it backward before the next is asked for.

        Args:
            batches: of one optimizer step, as ``Collator`` makes them. step: optimizer steps made before this one.

        Several processes: each gives its own; gradients are summed over them behind the last one's backward (DistributedDataParallel).
        """
        whole = self.drawn(batches, step)
        rows = self.count(whole, step)
        for number in range(len(whole)):
            with summing(self._loss.network, last=number == len(whole) - 1):
                yield self.share(whole[number], number, rows, step)[0]

    def drawn(self, batches: Sequence[Mapping[str, Any]], step: int) -> list[TrainBatch]:
        """The batches as methods take them; an elastic compressor's draw of the step is made."""
        return [self.module.draw(whole_batch(dict(one)), self.seed, step) for one in batches]

    def count(self, whole: Sequence[TrainBatch], step: int) -> StepRows:
        """How the rows of a step count. All processes call it."""
        return self._loss.rows_of(step, whole)

    def share(self, one: TrainBatch, number: int, rows: StepRows, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of batch ``number`` of the step, and each term's share of it (none of a filler)."""
        here, terms = self._loss.processes, self._loss.terms
        generator = torch.Generator().manual_seed(draw_seed(self.seed, step, here.rank, number))
        progress = step / self.total_steps if self.total_steps else 0.0
        weights = rows.weights[number]
        loss, values = self._loss.loss_of(one, progress, terms, generator, rows.denominators, weights)
        whole = summed_loss(loss * 0.0 if one.filler else loss, self._loss.network, here)
        return whole, {} if one.filler else values
