"""The only place that chunks and averages, by what ``counted.py`` says of every row.

Row terms see the student's logits ``[C, V]`` of C rows at a time: the head product, the losses and their gradients of one chunk are
finished before the next begins, so rows × V never exists. This is exact because the weight of every row is known beforehand
(1 / rows of the whole optimizer step); the chunk's gradients with respect to hidden states and head are kept, not its logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from student_train.losses.counted import TermWeights, Weights, counted
from student_train.losses.liger import fused_cross_entropy
from student_train.losses.precision import wide
from student_train.losses.terms import (
    HiddenRows,
    HiddenTerm,
    Rows,
    RowTerm,
    SampleRows,
    SampleTerm,
    StudentRows,
    Terms,
    label_loss,
)
from student_train.teacher_view import TeacherView
from teacher_cache.models.head import cap_in_place, chunk_rows, head_logits, slope_of_cap

CHUNK_BYTES = 8 << 20
"""float32 logits of a chunk on a CPU: with 128 MiB the passes of the losses took twice as long."""
BLOCKS = 4
"""A chunk's rows go through the losses in so many blocks: the head product wants many rows, the losses' temporaries few."""


def total_loss(
    terms: Terms,
    student: StudentRows,
    teacher: TeacherView,
    denominators: Mapping[str, float],
    use_liger_kernel: bool = False,
    weights: Weights | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Σ weight · Σ values / denominator over the micro-batch, and each term's (unweighted) share for the log.

    Args:
        denominators: of the whole optimizer step (``count_rows``); a term that nothing counts for has 0. weights: of its rows, by term.
        use_liger_kernel: take its fused cross-entropy where nothing else looks at the response rows' logits.
    """
    weights = weights or {}
    denominators = {name: denominators[name] or 1.0 for name in terms}
    total = student.head.new_zeros((), dtype=torch.float32)
    shares: dict[str, float] = {}
    kinds = sorted({term.rows for term in terms.values() if isinstance(term, RowTerm)})
    if use_liger_kernel and len(student.hidden.get("response", ())) and (name := _only_cross_entropy(terms, weights)):
        kinds.remove("response")
        fused = fused_cross_entropy(student.hidden["response"], student.head, student.labels, student.cap)
        shares[name] = float(fused.detach()) / denominators[name]
        total = total + fused * (terms[name].weight / denominators[name])
    losses = [
        _KindLoss(kind, terms, student, teacher, denominators, weights) for kind in kinds if len(student.hidden[kind])
    ]
    if losses:
        total = total + _ChunkedHead.apply(student.head, losses, *(student.hidden[one.kind] for one in losses))
        for one in losses:
            shares.update({name: float(value) for name, value in one.sums.items()})
    for name, term in terms.items():
        value = None if isinstance(term, RowTerm) else _summed(term, student, teacher, weights.get(name))
        if value is not None:
            total = total + value * (term.weight / denominators[name])
            shares[name] = float(value.detach()) / denominators[name]
    return total, {name: shares.get(name, 0.0) for name in terms}


def _summed(
    term: HiddenTerm | SampleTerm, student: StudentRows, teacher: TeacherView, weights: TermWeights | None
) -> torch.Tensor | None:
    found = _hidden_term if isinstance(term, HiddenTerm) else _sample_term
    return found(term, student, teacher, weights)  # type: ignore[arg-type]


def _only_cross_entropy(terms: Terms, weights: Weights) -> str | None:
    """The term on response rows' logits, where it is the only one and the cross-entropy of all rows."""
    found = {n: t for n, t in terms.items() if isinstance(t, RowTerm) and t.rows == "response"}
    fits = len(found) == 1 and all(term.loss is label_loss and not term.skip_first for term in found.values())
    fits = fits and not weights.keys() & found.keys()
    return next(iter(found)) if fits else None


class _KindLoss:
    """The row terms of one kind on some of its rows. ``sums``: what each term has come to so far, unweighted."""

    def __init__(
        self,
        kind: str,
        terms: Terms,
        student: StudentRows,
        teacher: TeacherView,
        denominators: Mapping[str, float],
        weights: Weights,
    ):
        self.kind = kind
        # Backwards: methods name the cross-entropy first, which has no teacher's logits to keep beside the others' gradient.
        self.terms = {n: t for n, t in reversed(list(terms.items())) if isinstance(t, RowTerm) and t.rows == kind}
        self.counted = {n: counted(term, student, teacher, weights.get(n)) for n, term in self.terms.items()}
        self.denominators = denominators
        self.labels = student.labels if kind == "response" else None
        self.cap = student.cap
        self.distribution, self.own = teacher.distributions.get(kind), teacher.self_teacher.get(kind)
        self.sums = {name: torch.zeros((), device=student.head.device) for name in self.terms}

    def __call__(self, logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss (scalar) and its gradient ``[C, V]`` at these rows' products h·Wᵀ, which become the logits where they lie.

        One term's temporaries are gone before the next's.
        """
        leaf = cap_in_place(logits.detach(), self.cap).requires_grad_()
        chunk = Rows(
            leaf,
            self.labels[rows] if self.labels is not None else None,
            self.distribution[rows] if self.distribution is not None else None,
            self.own[rows] if self.own is not None else None,
        )
        total = logits.new_zeros((), dtype=torch.float32)
        gradient: torch.Tensor | None = None
        for name, term in self.terms.items():
            with torch.enable_grad():
                values = term.loss(chunk)
                scaled = self.counted[name].values(values, rows).sum() / self.denominators[name]
                (own,) = torch.autograd.grad(term.weight * scaled, leaf)
            self.sums[name] += scaled.detach()
            total += term.weight * scaled.detach()
            gradient = own if gradient is None else gradient.add_(own)
            del own, values, scaled
        assert gradient is not None, "a kind has at least one term"
        if self.cap is not None:
            gradient = slope_of_cap(leaf.detach(), self.cap).mul_(gradient)
        return total, gradient


def _hidden_term(
    term: HiddenTerm, student: StudentRows, teacher: TeacherView, weights: TermWeights | None
) -> torch.Tensor | None:
    """Sum over the rows that count; None where there are none."""
    ours, theirs = student.hidden[term.rows], teacher.hidden.get(term.rows)
    assert theirs is not None, f"the method did not declare this need ({term.rows}_hidden)"
    if not len(ours):
        return None
    values = term.loss(HiddenRows(wide(ours), theirs, student.maps or {}))
    return counted(term, student, teacher, weights).values(values).sum()


def _sample_term(
    term: SampleTerm, student: StudentRows, teacher: TeacherView, weights: TermWeights | None
) -> torch.Tensor | None:
    """Sum over the samples that have the rows; None where there are none."""
    values = []
    for number in range(len(student.counts[term.rows[0]])):
        rows = {kind: student.counts[kind][number] - term.skip_first * (kind == "vision") for kind in term.rows}
        if all(count > 0 for count in rows.values()):
            value = term.loss(SampleRows(number, student, teacher, term.skip_first))
            values.append(value * weights.samples[number] if weights else value)
    return torch.stack(values).sum() if values else None


class _ChunkedHead(torch.autograd.Function):
    """loss = Σ_kinds Σ_chunks f(h_chunk · Wᵀ): gradients of h and W are finished chunk by chunk in the forward pass.

    Products take the hidden states' dtype as input; logits are float32 whatever that is. The losses see a chunk block by block, and
    each block's gradient takes the place of its logits: of ``[C, V]`` there is one matrix, everything else is of a block. All kinds
    share one gradient of the head. Backward may run once: it scales these gradients where they lie.
    """

    @staticmethod
    def forward(ctx, head: torch.Tensor, losses: Sequence[_KindLoss], *hidden: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        needs_head, _, *needs_hidden = ctx.needs_input_grad
        # A half-precision head (gathered for a step) is summed in float32 too; autograd rounds the sum to the head's type, once.
        grad_head = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32)) if needs_head else None
        grads_hidden = [torch.zeros_like(one) if needed else None for one, needed in zip(hidden, needs_hidden)]
        total = head.new_zeros((), dtype=torch.float32)
        rows = chunk_rows(head, CHUNK_BYTES)
        for loss, states, grad_hidden in zip(losses, hidden, grads_hidden):
            weight = head.detach().to(states.dtype)
            for start in range(0, len(states), rows):
                chunk = slice(start, min(start + rows, len(states)))
                value, gradient = _in_blocks(head_logits(states.detach()[chunk], weight), chunk, loss)
                total += value
                gradient = gradient.to(states.dtype)
                if grad_hidden is not None:
                    torch.mm(gradient, weight, out=grad_hidden[chunk])
                if grad_head is not None:
                    _accumulate(grad_head, gradient, states.detach()[chunk])
                del gradient  # before the next chunk's logits
        ctx.save_for_backward(grad_head, *grads_hidden)
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        grad_head, *grads_hidden = (one.mul_(grad) if one is not None else None for one in ctx.saved_tensors)
        return grad_head, None, *grads_hidden


def _in_blocks(logits: torch.Tensor, chunk: slice, loss: _KindLoss) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of a chunk; the gradient is written over the logits."""
    total = logits.new_zeros((), dtype=torch.float32)
    rows = -(-len(logits) // BLOCKS)
    for start in range(0, len(logits), rows):
        block = logits[start : start + rows]
        first = chunk.start + start
        value, gradient = loss(block, slice(first, first + len(block)))
        total += value
        block.copy_(gradient)
        del gradient  # before the next block's
    return total, logits


def _accumulate(grad_head: torch.Tensor, grad_logits: torch.Tensor, states: torch.Tensor) -> None:
    """grad_head += grad_logitsᵀ · states, in the head's own precision."""
    if grad_head.dtype == grad_logits.dtype:
        grad_head.addmm_(grad_logits.T, states)
    else:
        grad_head += _mm_float32(grad_logits.T, states).to(grad_head.dtype)


def _mm_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Product of two half-precision matrices; the result is not rounded to half precision where the device can do that."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left @ right
