"""Trainer.step: student forward, the method's terms, reduce, backward, step. It knows no method by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from student_train.checkpoint import Checkpoints
from student_train.config import TrainSettings
from student_train.distributed import Processes, spread, summed_loss, summing
from student_train.distributions import DenseTeacher
from student_train.draws import draw_seed
from student_train.losses.reduce import count_rows, total_loss
from student_train.losses.terms import FIRST_LAYER, Terms, kinds_of
from student_train.methods import Method, Passes, hook
from student_train.metrics_log import MetricsLog, OpenTrackers, StepResult, peak_memory, read_sizes
from student_train.stream import TrainBatch
from student_train.student import RowForward, module_group
from student_train.teacher_view import TeacherView
from teacher_cache import stopping
from teacher_cache.batch import Batch
from teacher_cache.errors import KdcliError, OutOfMemory, one_line, out_of_memory

StepBatches = Callable[[int], Iterator[tuple[int, list[TrainBatch]]]]
SeeTeacher = Callable[[TrainBatch], TeacherView]


@dataclass
class Trainer:
    """One stage of one run.

    Args:
        model: the student, its parameters frozen as the stage says. see_teacher: micro-batch → the teacher's side of it.
        folder: metrics and checkpoints. identity: what a checkpoint must agree with to be resumed.
        card: what the stage was told; before: the stages that it began from, with theirs. Both are kept in checkpoints.
        say: gets a note of each damaged checkpoint that was left out.
        open_trackers: first step of this start → where metrics go besides; asked of the main process alone.
    """

    model: RowForward
    method: Method
    see_teacher: SeeTeacher
    settings: TrainSettings
    processes: Processes
    folder: Path
    total_steps: int
    identity: dict[str, Any] = field(default_factory=dict)
    open_trackers: OpenTrackers = lambda first: ()
    card: dict[str, Any] = field(default_factory=dict)
    before: list[dict[str, Any]] = field(default_factory=list)
    say: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.stopping = False  # whether any process was asked to: known to all behind a step
        self.starts: list[dict[str, Any]] = []  # of ``Checkpoints``, once it has loaded
        self.terms: Terms = self.method.terms()
        self.matching = hook(self.method, "alignment")()
        self.kinds = sorted(kinds_of(self.terms) | ({"vision"} if self.matching else set()))
        s = self.settings
        # Maps of the first layer and rankings of pruned passes read weights of layers whose forward is over.
        reads_layers = bool(FIRST_LAYER & set(self.kinds)) or hasattr(self.method, "passes")
        self.network: torch.nn.Module = spread(self.model, self.processes, s.fsdp, s.bf16, reads_layers)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(),
            lr=s.learning_rate,
            betas=(s.adam_beta1, s.adam_beta2),
            weight_decay=s.weight_decay,
        )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """``share``: of the stage's learning rate. The vision tower has one of its own where it trains."""
        tower: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                ours = name.startswith("model.") and module_group(name, self.model.model.config) == "vision_tower"
                (tower if ours else rest).append(parameter)
        groups: list[dict[str, Any]] = [{"params": rest, "share": 1.0}]
        if tower:
            groups.append(
                {"params": tower, "share": self.settings.vision_tower_learning_rate / self.settings.learning_rate}
            )
        return groups

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over ``warmup_ratio`` of the steps, then a cosine to zero."""
        warmup = math.ceil(self.settings.warmup_ratio * self.total_steps)
        if step < warmup:
            return self.settings.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        return self.settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))

    def step(self, step: int, batches: list[TrainBatch]) -> StepResult:
        """One optimizer step over this process's micro-batches. Row means run over all micro-batches of all processes."""
        started = time.perf_counter()
        self._seed(step)
        batches = [self.model.draw(one, self.settings.seed, step) for one in batches]
        denominators = self._denominators(batches)
        shares = dict.fromkeys(self.terms, 0.0)
        loss_sum = 0.0
        for number, one in enumerate(batches):
            generator = self._generator(step, number)
            with summing(self.network, last=number == len(batches) - 1):
                loss, values = self._loss(step, one, generator, denominators)
                self._backward(loss * 0.0 if one.filler else loss)
            if one.filler:
                continue
            loss_sum += float(loss.detach())
            shares = {name: shares[name] + values[name] for name in shares}
        grad_norm = self._clip()
        if not math.isfinite(grad_norm):  # equal on every process, so all of them stop, before it reaches the weights
            raise KdcliError(
                f"{self.folder}: the gradient norm is {grad_norm} at step {step} (loss {loss_sum:.6g}): lower "
                "--learning-rate, or look at the data; the last checkpoint is intact"
            )
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        sizes = read_sizes([one for one in batches if not one.filler])
        left_out = tuple(line for one in batches for line in one.refused)
        mine = [
            loss_sum,
            float(stopping.asked() > 0),
            float(len(left_out)),
            *map(float, sizes.values()),
            *shares.values(),
        ]
        loss_all, asked, refused, *all_of_them = self.processes.sum(mine)
        self.stopping = asked > 0
        sizes_all, shares_all = map(int, all_of_them[: len(sizes)]), all_of_them[len(sizes) :]
        terms = dict(zip(shares, shares_all))
        result = StepResult(loss_all, terms, grad_norm, rate, **dict(zip(sizes, sizes_all)))
        result.refused, result.left_out = round(refused), left_out
        result.seconds = time.perf_counter() - started
        return result

    def _loss(
        self, step: int, one: TrainBatch, generator: torch.Generator, denominators: dict[str, float]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The method's loss of one micro-batch, and each term's share of it."""
        passes = hook(self.method, "passes")(step / self.total_steps, generator) or Passes()
        batch = one.batch.to(self.processes.device)
        view = self.see_teacher(one)
        if passes.self_teacher:
            view = replace(view, self_teacher=self._own_words(batch, passes))
        with self._autocast():
            hidden = self.network(batch, self.kinds, passes.student)
        student = self.model.rows(hidden, batch, one.student_text)
        if self.matching:
            view = self.matching.align(view, student, one, generator)
        return total_loss(self.terms, student, view, denominators, self.settings.use_liger_kernel)

    @torch.no_grad()
    def _own_words(self, batch: Batch, passes: Passes) -> dict[str, DenseTeacher]:
        """What the student's weights say in the pass that teaches, by row kind; past DDP, which waits for a backward pass."""
        with self._autocast():
            hidden = self.model(batch, self.kinds, passes.teacher)
        head = self.model.head.detach()
        return {kind: DenseTeacher(rows, head, self.model.form.cap) for kind, rows in hidden.items()}

    def _generator(self, step: int, micro_batch: int) -> torch.Generator:
        """Draws of a method, a function of (seed, step, process, micro-batch) for the same reason."""
        return torch.Generator().manual_seed(draw_seed(self.settings.seed, step, self.processes.rank, micro_batch))

    def _seed(self, step: int) -> None:
        """Dropout and the like are a function of (seed, step, process): a resumed run draws what an undisturbed one does."""
        torch.manual_seed(draw_seed(self.settings.seed, step, self.processes.rank))

    def _clip(self) -> float:
        """Gradient norm before clipping; ``max_grad_norm`` 0 means no clipping, as in transformers."""
        limit = self.settings.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _backward(self, loss: torch.Tensor) -> None:
        """Gradients of one micro-batch; one without images has none for a projector that is all that trains."""
        loss = summed_loss(loss, self.network, self.processes)
        if loss.requires_grad:
            loss.backward()

    def _denominators(self, batches: list[TrainBatch]) -> dict[str, float]:
        counted = [count_rows(self._counts(one), self.terms) for one in batches if not one.filler]
        mine = [sum(one[name] for one in counted) for name in self.terms]
        return dict(zip(self.terms, self.processes.sum(mine)))

    def _counts(self, one: TrainBatch) -> dict[str, Sequence[int]]:
        """Rows of each sample that can count: vision rows that a matching leaves out do not."""
        counts: dict[str, Sequence[int]] = dict(one.batch.counts)
        return counts | {"vision": self.matching.counts(one)} if self.matching else counts

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.settings.bf16:
            return nullcontext()
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16)

    @contextmanager
    def _naming_memory(self, step: int, batches: Sequence[TrainBatch]) -> Iterator[None]:
        """OutOfMemory of one line that names the step's micro-batches and the settings that make them smaller."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            rows, tokens = zip(*(one.batch.inputs["input_ids"].shape for one in batches))
            raise OutOfMemory(
                f"{self.folder}: out of memory at step {step}, with {len(batches)} micro-batches of up to {max(rows)} rows × "
                f"{max(tokens):,} tokens ({one_line(error)[:160] or type(error).__name__}): give a smaller "
                "--per-device-train-batch-size and more gradient_accumulation_steps, gradient_checkpointing = true, or bf16 = true; "
                "the last checkpoint is intact"
            ) from None

    def train(
        self, batches_from: StepBatches, on_step: Callable[[int, StepResult], None] = lambda step, result: None
    ) -> int:
        """Run the stage from its newest checkpoint (or the start) to its end; the number of steps that are made then.

        Where a process was asked to stop that is behind the next step of all, with a checkpoint.
        """
        keep, folder = self.settings.save_total_limit, self.folder / "checkpoints"
        told = (self.card, self.before, self.say)
        saved = Checkpoints(folder, self.model, self.optimizer, self.identity, keep, self.processes, *told)
        first, self.starts = saved.load(), saved.starts
        self.model.train()
        log = MetricsLog(self.folder, first, self.settings.logging_steps, self.processes, self.open_trackers)
        try:
            asked = time.perf_counter()
            for step, batches in batches_from(first):
                if step >= self.total_steps:
                    break
                waited = time.perf_counter() - asked
                with self._naming_memory(step, batches):
                    result = self.step(step, batches)
                result.data_seconds, result.peak_memory_bytes = waited, peak_memory(self.processes.device)
                if not math.isfinite(result.loss):
                    raise KdcliError(
                        f"{self.folder}: the loss is {result.loss} at step {step}: lower --learning-rate, or look at the data"
                    )
                log.write(step, result)
                on_step(step, result)
                due = self.stopping or (step + 1) % self.settings.save_steps == 0
                if due and step + 1 < self.total_steps:
                    saved.save(step + 1)
                if self.stopping:
                    saved.wait()
                    return step + 1
                asked = time.perf_counter()
            saved.wait()
            return self.total_steps
        finally:
            with suppress(KdcliError):  # what stopped the run says more
                saved.wait()
            log.close()
