"""The divergences with their gradients written down: half the passes over ``[R, V]`` that autograd takes (the tests' ``plain_losses``).

Each takes what is known of the teacher (mostly its log-probs b ``[R, V]``) and the student's logits z ``[R, V]`` and returns the value
``[R]`` and its gradient ∂/∂z ``[R, V]``; a = log softmax(z), p_s = e^a, p_t = e^b. For a divergence whose derivative after p_s is g,
∂/∂z = p_s·(g − Σ p_s g).

The mixtures m = c·p_t + (1−c)·p_s are never formed: with v = b − a − log((1−c)/c), c·p_t / m = σ(v) and (1−c)·p_s / m = σ(−v), so
b − log m = log σ(v) − log c and a − log m = log σ(−v) − log(1−c), without overflow however far apart both sides are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from teacher_cache.models.head import piece_rows

Divergence = Callable[..., tuple[torch.Tensor, torch.Tensor]]
LOG_ZERO = -1e30
"""Logit of a student's tail that has no tokens; no infinity, since 0·∞ is not 0."""


class WithGradient(torch.autograd.Function):
    """``apply(divergence, teacher, student logits [R, V_s], vocabulary, temperature) -> [R]``.

    teacher: tensors of R rows, the divergence's arguments before the logits. The student's columns beyond ``vocabulary`` are padding:
    no part of its softmax, their gradient is 0. Rows go through in pieces, so that what is kept of ``[R, V]`` is the gradient alone.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        divergence: Divergence,
        teacher: tuple[torch.Tensor, ...],
        student: torch.Tensor,
        vocabulary: int | None = None,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        width = student.shape[1] if vocabulary is None else vocabulary
        rows = piece_rows(student)
        if len(student) <= rows and width == student.shape[1] and temperature == 1.0:
            value, gradient = divergence(*teacher, student)
            ctx.save_for_backward(gradient)
            return value
        values, gradient = [], torch.empty_like(student)
        gradient[:, width:] = 0.0
        sides = zip(*(one.split(rows) for one in (*teacher, student, gradient)))
        for *known, logits, out in sides:
            logits = logits[:, :width]
            value, slope = divergence(*known, logits if temperature == 1.0 else logits / temperature)
            torch.mul(slope, 1.0 / temperature, out=out[:, :width])
            values.append(value)
        ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[None, None, torch.Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return None, None, gradient * grad[:, None], None, None


def cross_entropy(labels: torch.Tensor, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """−a at the label, gradient p_s − 1 there."""
    log_s, at = torch.log_softmax(student, dim=1), labels[:, None]
    value = -log_s.gather(1, at)[:, 0]
    return value, log_s.exp_().scatter_add_(1, at, log_s.new_full((1, 1), -1.0).expand_as(at))


def forward_kl(teacher: torch.Tensor, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ p_t (b − a), gradient p_s − p_t."""
    log_s, p_t = torch.log_softmax(student, dim=1), teacher.exp()
    value = torch.linalg.vecdot(p_t, teacher - log_s)
    return value, log_s.exp_().sub_(p_t)


def reverse_kl(teacher: torch.Tensor, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ p_s (a − b), gradient p_s (a − b − KL)."""
    log_s = torch.log_softmax(student, dim=1)
    ratio, p_s = log_s - teacher, log_s.exp_()
    value = torch.linalg.vecdot(p_s, ratio)
    return value, ratio.sub_(value[:, None]).mul_(p_s)


def jensen_shannon(teacher: torch.Tensor, student: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """β Σ p_t (b − log m) + (1−β) Σ p_s (a − log m), m = β p_t + (1−β) p_s; gradient (1−β) p_s (a − log m − KL(p_s ‖ m))."""
    log_s, p_t = torch.log_softmax(student, dim=1), teacher.exp()
    odds = (teacher - log_s).sub_(_log_odds(beta))
    p_s, from_t = log_s.exp_(), F.logsigmoid(odds)
    from_s = torch.sub(from_t, odds, out=odds)  # log σ(−v) = log σ(v) − v
    mean_t, mean_s = torch.linalg.vecdot(p_t, from_t), torch.linalg.vecdot(p_s, from_s)
    value = beta * (mean_t - math.log(beta)) + (1 - beta) * (mean_s - math.log1p(-beta))
    return value, from_s.sub_(mean_s[:, None]).mul_(p_s.mul_(1 - beta))


def skew_kl(teacher: torch.Tensor, student: torch.Tensor, skew: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ p_t (b − log m), m = α p_t + (1−α) p_s; gradient p_s Σ p_t w − p_t w, w = (1−α) p_s / m."""
    log_s, p_t = torch.log_softmax(student, dim=1), teacher.exp()
    odds = (teacher - log_s).sub_(_log_odds(skew))
    value = torch.linalg.vecdot(p_t, F.logsigmoid(odds)) - math.log(skew)
    pull = odds.neg_().sigmoid_().mul_(p_t)
    return value, log_s.exp_().mul_(pull.sum(dim=1, keepdim=True)).sub_(pull)


def skew_reverse_kl(teacher: torch.Tensor, student: torch.Tensor, skew: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ p_s (a − log m), m = (1−α) p_t + α p_s; gradient p_s (g − Σ p_s g), g = a − log m − α p_s / m."""
    log_s = torch.log_softmax(student, dim=1)
    odds = (log_s - teacher).sub_(_log_odds(skew))
    p_s, ratio = log_s.exp_(), F.logsigmoid(odds)
    value = torch.linalg.vecdot(p_s, ratio) - math.log(skew)
    slope = ratio.sub_(odds.sigmoid_())
    return value, slope.sub_(torch.linalg.vecdot(p_s, slope)[:, None]).mul_(p_s)


def _log_odds(share: float) -> float:
    """log((1−c)/c), c in (0, 1): at the ends the mixture is one of its sides and the divergence 0, or a plain KL."""
    if not 0.0 < share < 1.0:
        raise ValueError(f"the share of a mixture must be in (0, 1), got {share}")
    return math.log1p(-share) - math.log(share)


class MergeTail(torch.autograd.Function):
    """``apply(ids [R, K], logits [R, V_s], vocabulary) -> [R, K + 1]``: the head's logits, and the log-sum-exp of all others as one.

    Columns beyond ``vocabulary`` are padding: in neither.

    The only passes over ``[R, V]`` that a top-k teacher costs, whatever the divergence: log σ over K + 1 outcomes is the log-prob of
    each id and of the tail, and 1 − Σ_head is taken without cancellation.
    """

    @staticmethod
    def forward(ctx, ids: torch.Tensor, logits: torch.Tensor, vocabulary: int | None = None) -> torch.Tensor:  # type: ignore[override]
        ctx.width = logits.shape[1]
        outside = logits[:, :vocabulary].scatter(1, ids, -torch.inf)
        peak = outside.amax(dim=1, keepdim=True).clamp_min(LOG_ZERO)  # K = V: nothing is outside
        mass = outside.sub_(peak).exp_().sum(dim=1, keepdim=True)
        ctx.save_for_backward(ids, outside, mass)
        return torch.cat([logits.gather(1, ids), (peak + mass.log()).clamp_min(LOG_ZERO)], dim=1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[None, torch.Tensor, None]:  # type: ignore[override]
        ids, outside, mass = ctx.saved_tensors
        share = grad[:, -1:] / mass.clamp_min(torch.finfo(mass.dtype).tiny)
        gradient = outside.new_empty(len(outside), ctx.width)
        gradient[:, outside.shape[1] :] = 0.0
        torch.mul(outside, share, out=gradient[:, : outside.shape[1]])
        return None, gradient.scatter_(1, ids, grad[:, :-1]), None
