"""Divergences between teacher and student rows. All return float32 ``[R]`` in nats, with gradients to the student's logits.

The student's softmax runs over the vocabulary that both sides have: columns beyond the teacher's are padding of the head.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from student_train.teacher_view import Distribution, HeadAndTail, is_full
from teacher_cache.errors import CompatibilityError


def cross_entropy(student_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−log p_s(label) ``[R]`` from logits ``[R, V]``."""
    return F.cross_entropy(student_logits.to(torch.float32), labels, reduction="none")


def forward_kl(teacher: Distribution, student_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(p_t ‖ p_s) ``[R]``; exact from a dense teacher, with everything outside the head as one bucket from top-k.

    The bucket form is a lower bound of the dense KL (log-sum inequality) and exact in the head's part.
    """
    if is_full(teacher):
        return forward_kl_dense(teacher.log_probs(temperature), student_logits, temperature)  # type: ignore[attr-defined]
    if isinstance(teacher, HeadAndTail):
        if temperature != 1.0:
            raise CompatibilityError(
                "a top-k field is valid at temperature 1 only: capture response_hidden and vision_hidden, or --set temperature=1.0"
            )
        return forward_kl_bucket(teacher, student_logits)
    raise TypeError(f"no forward KL from {type(teacher).__name__}")


def forward_kl_dense(
    teacher_log_probs: torch.Tensor, student_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """KL(p_t ‖ softmax(z_s/T)) of the teacher's log-probs ``[R, V_t]`` and logits ``[R, V_s ≥ V_t]``."""
    student = _shared(student_logits, teacher_log_probs.shape[1])
    return _ForwardKL.apply(
        teacher_log_probs.to(torch.float32), student if temperature == 1.0 else student / temperature
    )


def _shared(logits: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """float32 columns that both sides have; no slice where that is all of them, since its gradient is one more copy."""
    return (logits if logits.shape[1] == vocabulary else logits[:, :vocabulary]).to(torch.float32)


class _ForwardKL(torch.autograd.Function):
    """KL with its gradient p_s − p_t written down once: half the passes over ``[R, V]`` of the autograd form (its test twin)."""

    @staticmethod
    def forward(ctx, teacher_log_probs: torch.Tensor, student_logits: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        student_log_probs = torch.log_softmax(student_logits, dim=1)
        teacher_probs = teacher_log_probs.exp()
        value = torch.linalg.vecdot(teacher_probs, teacher_log_probs - student_log_probs)
        ctx.save_for_backward(student_log_probs.exp_().sub_(teacher_probs))
        return value

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[None, torch.Tensor]:  # type: ignore[override]
        (difference,) = ctx.saved_tensors
        return None, difference * grad[:, None]


def forward_kl_bucket(teacher: HeadAndTail, student_logits: torch.Tensor) -> torch.Tensor:
    """Σ_head p_t (log p_t − log p_s) + tail·(log tail_t − log tail_s), tail_s = 1 − Σ_head p_s taken without cancellation."""
    topk = teacher.topk
    logits = _shared(student_logits, teacher.vocabulary)
    return _ForwardKLBucket.apply(topk.ids, topk.log_probs, topk.log_tail, logits)


class _ForwardKLBucket(torch.autograd.Function):
    """The bucket form with its gradient (Σp + t)·p_s − p in the head, ((Σp + t) − t / tail_s)·p_s outside, t the teacher's tail.

    The gradient is written over the outside's exponentials: a third of the passes of ``forward_kl_bucket_plain``, its test twin.
    """

    @staticmethod
    def forward(ctx, ids, log_probs, log_tail, logits: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        least = torch.finfo(torch.float32).min
        probs, tail = log_probs.exp(), log_tail.exp()
        head = logits.gather(1, ids)
        outside = logits.scatter(1, ids, -torch.inf)
        peak = outside.amax(dim=1).clamp_min(least)  # K = V: nothing is outside
        mass = outside.sub_(peak[:, None]).exp_().sum(dim=1)
        log_outside = peak + mass.log()
        log_z = torch.logaddexp(head.logsumexp(dim=1), log_outside)
        total = probs.sum(dim=1) + tail
        log_head = head - log_z[:, None]
        in_tail = torch.where(tail > 0, tail * (log_tail - (log_outside - log_z).clamp_min(least)), 0.0)
        outside.mul_((total * (peak - log_z).exp() - tail / mass.clamp_min(1e-30))[:, None])
        ctx.save_for_backward(outside.scatter_(1, ids, total[:, None] * log_head.exp() - probs))
        return (probs * (log_probs - log_head)).sum(dim=1) + in_tail

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[None, None, None, torch.Tensor]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return None, None, None, gradient * grad[:, None]


def forward_kl_bucket_plain(teacher: HeadAndTail, student_logits: torch.Tensor) -> torch.Tensor:
    """Slow twin of ``forward_kl_bucket``: the formula as autograd differentiates it."""
    topk = teacher.topk
    logits = student_logits[:, : teacher.vocabulary].to(torch.float32)
    log_z = logits.logsumexp(dim=1)
    head = logits.gather(1, topk.ids) - log_z[:, None]
    outside = logits.scatter(1, topk.ids, float("-inf"))
    tail = outside.logsumexp(dim=1) - log_z
    probs, tail_mass = topk.log_probs.exp(), topk.log_tail.exp()
    in_head = (probs * (topk.log_probs - head)).sum(dim=1)
    has_tail = tail_mass > 0  # K = V, or a tail below float32: 0·(−∞ − x) must count as 0
    in_tail = torch.where(has_tail, tail_mass * (topk.log_tail.clamp_min(-1e30) - tail.clamp_min(-1e30)), 0.0)
    return in_head + in_tail
