"""The only place that chunks, masks and averages.

Row terms see the student's logits ``[C, V]`` of C rows at a time: the head product, the losses and their gradients of one chunk are
finished before the next begins, so rows × V never exists. This is exact because the weight of every row is known beforehand
(1 / rows of the whole optimizer step); the chunk's gradients with respect to hidden states and head are kept, not its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from student_train.teacher_view import Distribution, TeacherView
from teacher_cache.teachers.head import chunk_rows, head_logits

CHUNK_BYTES = 8 << 20
"""float32 logits of a chunk on a CPU: with 128 MiB the passes of the losses took twice as long."""


@dataclass(frozen=True)
class Rows:
    """A chunk of C rows of one kind, as a method's loss sees it.

    Attributes:
        logits: ``[C, V]`` of the student. labels: ``[C]`` for response rows, None for vision rows.
        teacher: the same rows of the teacher, None where the method needs no logits of this kind.
    """

    logits: torch.Tensor
    labels: torch.Tensor | None
    teacher: Distribution | None

    def need_labels(self) -> torch.Tensor:
        assert self.labels is not None, "only response rows have labels"
        return self.labels

    def need_teacher(self) -> Distribution:
        assert self.teacher is not None, "the method did not declare this need"
        return self.teacher


@dataclass(frozen=True)
class RowTerm:
    """weight × mean over rows of ``loss(chunk) -> [C]``. rows: ``response`` or ``vision``.

    skip_first: leave out so many rows at the start of every sample (LLaVA-KD's code drops one vision row).
    sum_rows: sum over the rows of a sample, mean over samples, instead of the mean over all rows.
    """

    weight: float
    rows: str
    loss: Callable[[Rows], torch.Tensor]
    skip_first: int = 0
    sum_rows: bool = False


@dataclass(frozen=True)
class SampleTerm:
    """weight × mean over samples with an image of ``loss(teacher Gram [N, N], student Gram [N, N]) -> scalar``."""

    weight: float
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    skip_first: int = 0


Terms = Mapping[str, RowTerm | SampleTerm]


@dataclass(frozen=True)
class StudentRows:
    """The student's side of a micro-batch.

    Attributes:
        hidden: by row kind ``[R, D]``, with gradient. counts: by kind, rows of each sample.
        head: ``[V, D]``, with gradient where it is trained. labels: ``[R_response]``.
        head_gram: columns V → WᵀW ``[D, D]`` of the head's first V rows (None: all), with gradient where the head is trained;
            only made where a SampleTerm asks.
    """

    hidden: Mapping[str, torch.Tensor]
    counts: Mapping[str, Sequence[int]]
    head: torch.Tensor
    labels: torch.Tensor
    head_gram: Callable[[int | None], torch.Tensor]


def count_rows(counts: Mapping[str, Sequence[int]], terms: Terms) -> dict[str, float]:
    """Denominator contributed by a micro-batch to every term; summed over the optimizer step and all processes."""
    totals = {}
    for name, term in terms.items():
        kind = term.rows if isinstance(term, RowTerm) else "vision"
        rows = [max(0, count - term.skip_first) for count in counts[kind]]
        per_row = isinstance(term, RowTerm) and not term.sum_rows
        totals[name] = float(sum(rows) if per_row else sum(count > 0 for count in rows))
    return totals


def total_loss(
    terms: Terms, student: StudentRows, teacher: TeacherView, denominators: Mapping[str, float]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Σ weight · Σ values / denominator over the micro-batch, and each term's (unweighted) share for the log."""
    total = student.head.new_zeros((), dtype=torch.float32)
    shares: dict[str, float] = {}
    for kind in ("response", "vision"):
        chosen = {n: t for n, t in terms.items() if isinstance(t, RowTerm) and t.rows == kind}
        if chosen and len(student.hidden[kind]):
            loss, values = _row_terms(chosen, kind, student, teacher, denominators)
            total = total + loss
            shares.update(values)
    for name, term in terms.items():
        if isinstance(term, SampleTerm):
            value = _sample_term(term, student, teacher)
            if value is not None:
                total = total + value * (term.weight / max(denominators[name], 1.0))
                shares[name] = float(value.detach()) / max(denominators[name], 1.0)
    return total, {name: shares.get(name, 0.0) for name in terms}


def _row_terms(
    terms: Mapping[str, RowTerm],
    kind: str,
    student: StudentRows,
    teacher: TeacherView,
    denominators: Mapping[str, float],
) -> tuple[torch.Tensor, dict[str, float]]:
    masks = {name: _keep(student.counts[kind], term.skip_first, student.head.device) for name, term in terms.items()}
    distribution = teacher.distributions.get(kind)
    sums = {name: torch.zeros((), device=student.head.device) for name in terms}

    def chunk_loss(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        chunk = Rows(
            logits,
            student.labels[rows] if kind == "response" else None,
            distribution[rows] if distribution is not None else None,
        )
        total = logits.new_zeros((), dtype=torch.float32)
        for name, term in terms.items():
            values = term.loss(chunk)
            mask = masks[name]
            kept = values if mask is None else torch.where(mask[rows], values, 0.0)
            scaled = kept.sum() / max(denominators[name], 1.0)
            sums[name] = sums[name] + scaled.detach()
            total = total + term.weight * scaled
        return total

    loss = _ChunkedHead.apply(student.hidden[kind], student.head, chunk_loss)
    return loss, {name: float(value) for name, value in sums.items()}


def _keep(counts: Sequence[int], skip_first: int, device: torch.device) -> torch.Tensor | None:
    """Mask of the rows that count; None where all do."""
    if not skip_first:
        return None
    return torch.cat([torch.arange(count, device=device) >= skip_first for count in counts])


class _ChunkedHead(torch.autograd.Function):
    """loss = Σ_chunks f(h_chunk · Wᵀ): gradients of h and W are finished chunk by chunk in the forward pass.

    Products take the hidden states' dtype as input; logits are float32 whatever that is.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, head: torch.Tensor, chunk_loss) -> torch.Tensor:  # type: ignore[override]
        weight = head.detach().to(hidden.dtype)
        needs_hidden, needs_head, _ = ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head) if needs_head else None
        total = hidden.new_zeros((), dtype=torch.float32)
        rows = chunk_rows(head, CHUNK_BYTES)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, min(start + rows, len(hidden)))
            states = hidden.detach()[chunk]
            logits = head_logits(states, weight)
            with torch.enable_grad():
                leaf = logits.requires_grad_()
                loss = chunk_loss(leaf, chunk)
                (grad_logits,) = torch.autograd.grad(loss, leaf)
            total += loss.detach()
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if grad_head is not None:
                _accumulate(grad_head, grad_logits, states)
        ctx.save_for_backward(grad_hidden, grad_head)
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:  # type: ignore[override]
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            grad_hidden * grad if grad_hidden is not None else None,
            grad_head * grad if grad_head is not None else None,
            None,
        )


def _accumulate(grad_head: torch.Tensor, grad_logits: torch.Tensor, states: torch.Tensor) -> None:
    """grad_head += grad_logitsᵀ · states, in the head's own precision."""
    if grad_head.dtype == grad_logits.dtype:
        grad_head.addmm_(grad_logits.T, states)
    else:
        grad_head += _mm_float32(grad_logits.T, states).to(grad_head.dtype)


def _mm_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Product of two half-precision matrices; the result is not rounded to half precision where the device can do that."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left @ right


def _sample_term(term: SampleTerm, student: StudentRows, teacher: TeacherView) -> torch.Tensor | None:
    """Sum over the samples that have vision rows; None where there are none."""
    assert teacher.relations is not None, "the method did not declare vision_relation"
    samples = student.hidden["vision"].split(list(student.counts["vision"]))
    pairs = [
        (rows[term.skip_first :].to(torch.float32), target[term.skip_first :, term.skip_first :])
        for rows, target in zip(samples, teacher.relations, strict=True)
        if len(rows) > term.skip_first
    ]
    if not pairs:
        return None
    gram = student.head_gram(teacher.vocabulary)
    values = [term.loss(target, (rows @ gram) @ rows.T) for rows, target in pairs]
    return torch.stack(values).sum()
