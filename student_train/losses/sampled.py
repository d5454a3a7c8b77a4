"""Forward KL from unbiased samples of the teacher (``*_sampled`` fields), at temperature 1.

KL(p_t ‖ p_s) = −Σ p_t log p_s − H(p_t) is linear in p_t but for the entropy, which is stored: with weights w, E[w] = p_t, the estimate
Σ w_i (−log p_s(i)) − H(p_t) is right on average, and so is its gradient (Σw)·p_s − w. A single row's may be below 0. Nothing that is
not linear in p_t can be had from samples.
"""

from __future__ import annotations

import torch

from student_train.distributions import SampledTeacher
from student_train.losses.written import WithGradient
from teacher_cache.errors import CompatibilityError


def forward_kl_sampled(teacher: SampledTeacher, student_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Estimate of KL(p_t ‖ p_s) float32 ``[R]`` in nats, logits ``[R, ≥ V]``; CompatibilityError at a temperature other than 1."""
    if temperature != 1.0:
        raise CompatibilityError(
            "a sampled field is valid at temperature 1 only: capture response_hidden and vision_hidden, or --set temperature=1.0"
        )
    known = (teacher.sampled.entropy, teacher.sampled.ids, teacher.sampled.weights)
    return WithGradient.apply(_written, known, student_logits.to(torch.float32), teacher.vocabulary)


def _written(
    entropy: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, student: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value ``[R]`` and gradient ``[R, V]`` (``losses.written``): one pass for the softmax, K columns for everything else."""
    log_s = torch.log_softmax(student, dim=1)
    value = -torch.linalg.vecdot(weights, log_s.gather(1, ids)) - entropy
    gradient = log_s.exp_().mul_(weights.sum(dim=1, keepdim=True))
    return value, gradient.scatter_add_(1, ids, -weights)
