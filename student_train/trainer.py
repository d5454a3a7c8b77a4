"""Trainer.step: student forward, the method's terms, reduce, backward, step. It knows no method by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from student_train.checkpoint import Checkpoints
from student_train.dataset import TrainBatch
from student_train.distributed import spread, summed_loss, summing
from student_train.draws import draw_seed
from student_train.load_student import module_group
from student_train.losses.terms import FIRST_LAYER, Terms
from student_train.method_loss import MethodLoss
from student_train.metrics_log import MetricsLog, OpenTrackers, StepResult, peak_memory, summed_result
from student_train.schedules import Schedule, scheduled
from student_train.step_rows import StepRows
from student_train.term_gradients import term_gradients
from teacher_cache.errors import KdcliError, OutOfMemory, one_line, out_of_memory

StepBatches = Callable[[int], Iterator[tuple[int, list[TrainBatch]]]]


@dataclass
class Trainer(MethodLoss):
    """One stage of one run, whose loss is a ``MethodLoss``.

    Args:
        model: the student, its parameters frozen as the stage says.
        schedules: of terms' weights.
        folder: metrics and checkpoints. identity: what a checkpoint must agree with to be resumed.
        card: what the stage was told; before: the stages that it began from, with theirs. Both are kept in checkpoints.
        say: gets notes: of each damaged checkpoint that was left out, of a term that nothing counts for.
        open_trackers: first step of this start → where metrics go besides; asked of the main process alone.
    """

    folder: Path
    total_steps: int
    identity: dict[str, Any] = field(default_factory=dict)
    open_trackers: OpenTrackers = lambda first: ()
    card: dict[str, Any] = field(default_factory=dict)
    before: list[dict[str, Any]] = field(default_factory=list)
    say: Callable[[str], None] = lambda text: None
    schedules: Mapping[str, Schedule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stopping = False  # whether any process was asked to: known to all behind a step
        self.starts: list[dict[str, Any]] = []  # of ``Checkpoints``, once it has loaded
        self.told_empty: set[str] = set()  # terms that had no row left in some step
        s = self.settings
        # Maps of the first layer and rankings of pruned passes read weights of layers whose forward is over.
        reads_layers = bool(FIRST_LAYER & set(self.kinds)) or hasattr(self.method, "passes")
        self.network = spread(self.model, self.processes, s.fsdp, s.bf16, reads_layers)
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
        batches, terms = self.drawn(step, batches), self.terms_at(step)
        rows = self.rows_of(step, batches)
        loss, shares = self.accumulate(step, batches, terms, rows)
        grad_norm = self._clip()
        if not math.isfinite(grad_norm):  # equal on every process, so all of them stop, before it reaches the weights
            raise KdcliError(
                f"{self.folder}: the gradient norm is {grad_norm} at step {step} (loss {loss:.6g}): lower "
                "--learning-rate, or look at the data; the last checkpoint is intact"
            )
        rate = self._update(step)
        result, self.stopping = summed_result(batches, loss, shares, self.processes)
        result.grad_norm, result.learning_rate, result.kept = grad_norm, rate, rows.kept
        result.weights = {name: term.weight for name, term in terms.items() if name in self.schedules}
        result.seconds = time.perf_counter() - started
        return result

    def drawn(self, step: int, batches: Sequence[TrainBatch]) -> list[TrainBatch]:
        """The micro-batches as the student reads them in this step."""
        return [self.model.draw(one, self.settings.seed, step) for one in batches]

    def terms_at(self, step: int) -> Terms:
        """The method's terms with their weights at a step."""
        return scheduled(self.terms, self.schedules, step, self.total_steps)

    def accumulate(
        self, step: int, batches: Sequence[TrainBatch], terms: Terms, rows: StepRows
    ) -> tuple[float, dict[str, float]]:
        """Gradients of these terms over all micro-batches; this process's share of the loss and of each term."""
        self._seed(step)
        shares = dict.fromkeys(terms, 0.0)
        loss_sum, progress = 0.0, step / self.total_steps
        for number, one in enumerate(batches):
            generator = self._generator(step, number)
            with summing(self.network, last=number == len(batches) - 1):
                loss, values = self.loss_of(one, progress, terms, generator, rows.denominators, rows.weights[number])
                self._backward(loss * 0.0 if one.filler else loss)
            if one.filler:
                continue
            loss_sum += float(loss.detach())
            shares = {name: shares[name] + values[name] for name in shares}
        return loss_sum, shares

    def _update(self, step: int) -> float:
        """The weights by their gradients, which are gone then; the learning rate."""
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return rate

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

    def rows_of(self, step: int, batches: Sequence[TrainBatch]) -> StepRows:
        """How the rows of a step count: known before its first pass, by the cache alone."""
        rows = super().rows_of(step, batches)
        for name in (one for one, share in rows.kept.items() if not share and one not in self.told_empty):
            self.told_empty.add(name)
            if self.processes.is_main:
                self.say(
                    f"note: step {step}: select keeps no row of term {name}, which trains nothing in such steps; kept/{name} in "
                    "metrics.jsonl shows how much it keeps"
                )
        return rows

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
        every = self.settings.log_term_gradients
        log = MetricsLog(self.folder, first, self.settings.logging_steps, self.processes, self.open_trackers)
        try:
            asked = time.perf_counter()
            for step, batches in batches_from(first):
                if step >= self.total_steps:
                    break
                waited = time.perf_counter() - asked
                with self._naming_memory(step, batches):
                    gradients = term_gradients(self, step, batches) if every and step % every == 0 else {}
                    result = self.step(step, batches)
                result.gradients = gradients
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
