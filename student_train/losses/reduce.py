"""The only place that chunks, masks and averages.

Row terms see the student's logits ``[C, V]`` of C rows at a time: the head product, the losses and their gradients of one chunk are
finished before the next begins, so rows × V never exists. This is exact because the weight of every row is known beforehand
(1 / rows of the whole optimizer step); the chunk's gradients with respect to hidden states and head are kept, not its logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from student_train.losses.terms import HiddenRows, HiddenTerm, Rows, RowTerm, SampleRows, SampleTerm, StudentRows, Terms
from student_train.teacher_view import TeacherView
from teacher_cache.teachers.head import chunk_rows, head_logits

CHUNK_BYTES = 8 << 20
"""float32 logits of a chunk on a CPU: with 128 MiB the passes of the losses took twice as long."""


def count_rows(counts: Mapping[str, Sequence[int]], terms: Terms) -> dict[str, float]:
    """Denominator contributed by a micro-batch to every term; summed over the optimizer step and all processes.

    Args:
        counts: by row kind, rows of each sample that can count (a matched method's ``vision`` without those that nothing matches).
    """
    return {name: _count(counts, term) for name, term in terms.items()}


def _count(counts: Mapping[str, Sequence[int]], term: RowTerm | HiddenTerm | SampleTerm) -> float:
    if isinstance(term, HiddenTerm):
        return float(sum(counts[term.rows]))
    if isinstance(term, SampleTerm):
        skipped = [[max(0, n - term.skip_first * (kind == "vision")) for n in counts[kind]] for kind in term.rows]
        return float(sum(all(sample) for sample in zip(*skipped)))
    rows = [max(0, count - term.skip_first) for count in counts[term.rows]]
    return float(sum(count > 0 for count in rows) if term.sum_rows else sum(rows))


def total_loss(
    terms: Terms, student: StudentRows, teacher: TeacherView, denominators: Mapping[str, float]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Σ weight · Σ values / denominator over the micro-batch, and each term's (unweighted) share for the log."""
    total = student.head.new_zeros((), dtype=torch.float32)
    shares: dict[str, float] = {}
    for kind in sorted({term.rows for term in terms.values() if isinstance(term, RowTerm)}):
        chosen = {n: t for n, t in terms.items() if isinstance(t, RowTerm) and t.rows == kind}
        if len(student.hidden[kind]):
            loss, values = _row_terms(chosen, kind, student, teacher, denominators)
            total = total + loss
            shares.update(values)
    for name, term in terms.items():
        value = None if isinstance(term, RowTerm) else _summed(term, student, teacher)
        if value is not None:
            total = total + value * (term.weight / max(denominators[name], 1.0))
            shares[name] = float(value.detach()) / max(denominators[name], 1.0)
    return total, {name: shares.get(name, 0.0) for name in terms}


def _summed(term: HiddenTerm | SampleTerm, student: StudentRows, teacher: TeacherView) -> torch.Tensor | None:
    return (
        _hidden_term(term, student, teacher) if isinstance(term, HiddenTerm) else _sample_term(term, student, teacher)
    )


def _row_terms(
    terms: Mapping[str, RowTerm],
    kind: str,
    student: StudentRows,
    teacher: TeacherView,
    denominators: Mapping[str, float],
) -> tuple[torch.Tensor, dict[str, float]]:
    masks = {name: _keep(kind, student, teacher, term.skip_first) for name, term in terms.items()}
    distribution, own = teacher.distributions.get(kind), teacher.self_teacher.get(kind)
    sums = {name: torch.zeros((), device=student.head.device) for name in terms}

    def chunk_loss(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        chunk = Rows(
            logits,
            student.labels[rows] if kind == "response" else None,
            distribution[rows] if distribution is not None else None,
            own[rows] if own is not None else None,
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


def _keep(kind: str, student: StudentRows, teacher: TeacherView, skip_first: int) -> torch.Tensor | None:
    """Mask of the rows that count, bool ``[R]``; None where all do."""
    counts, device = student.counts[kind], student.head.device
    mask = None
    if skip_first:
        mask = torch.cat([torch.arange(count, device=device) >= skip_first for count in counts])
    if kind == "vision" and teacher.matched is not None:
        matched = torch.cat(list(teacher.matched))
        mask = matched if mask is None else mask & matched
    return mask


def _hidden_term(term: HiddenTerm, student: StudentRows, teacher: TeacherView) -> torch.Tensor | None:
    """Sum over the rows that count; None where there are none."""
    ours, theirs = student.hidden[term.rows], teacher.hidden.get(term.rows)
    assert theirs is not None, f"the method did not declare this need ({term.rows}_hidden)"
    if not len(ours):
        return None
    values = term.loss(HiddenRows(ours.to(torch.float32), theirs, student.maps or {}))
    mask = _keep(term.rows, student, teacher, 0)
    return (values if mask is None else torch.where(mask, values, 0.0)).sum()


def _sample_term(term: SampleTerm, student: StudentRows, teacher: TeacherView) -> torch.Tensor | None:
    """Sum over the samples that have the rows; None where there are none."""
    values = []
    for number in range(len(student.counts[term.rows[0]])):
        rows = {kind: student.counts[kind][number] - term.skip_first * (kind == "vision") for kind in term.rows}
        if all(count > 0 for count in rows.values()):
            values.append(term.loss(SampleRows(number, student, teacher, term.skip_first)))
    return torch.stack(values).sum() if values else None


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
