"""Slow twins of what ``student_train`` computes fast: the definitions, as autograd differentiates them.

The divergences take the teacher's log-probs ``[R, V]`` and the student's logits ``[R, V]`` and return ``[R]`` in their dtype.
"""

from __future__ import annotations

import math

import torch

from student_train.distributions import FullVocabulary, SampledTeacher
from student_train.losses.column_sampling import sampler_of_head
from student_train.losses.written import LOG_ZERO


def forward_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return kl(teacher, student.log_softmax(1))


def reverse_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return kl(student.log_softmax(1), teacher)


def jensen_shannon(teacher: torch.Tensor, student: torch.Tensor, beta: float) -> torch.Tensor:
    log_s = student.log_softmax(1)
    middle = log_mixture(teacher, log_s, beta)
    return beta * kl(teacher, middle) + (1 - beta) * kl(log_s, middle)


def skew_kl(teacher: torch.Tensor, student: torch.Tensor, skew: float) -> torch.Tensor:
    return kl(teacher, log_mixture(teacher, student.log_softmax(1), skew))


def skew_reverse_kl(teacher: torch.Tensor, student: torch.Tensor, skew: float) -> torch.Tensor:
    log_s = student.log_softmax(1)
    return kl(log_s, log_mixture(teacher, log_s, 1 - skew))


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Σ p (log p − log q), 0·log 0 = 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)


def log_mixture(log_t: torch.Tensor, log_s: torch.Tensor, share: float) -> torch.Tensor:
    """log(c·p_t + (1−c)·p_s)."""
    return torch.logaddexp(log_t + math.log(share), log_s + math.log1p(-share))


def merge_tail(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Twin of ``written.MergeTail``: logits of the ids ``[R, K]`` and the log-sum-exp of all others."""
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, ids, False)
    tail = logits.masked_fill(~others, LOG_ZERO).logsumexp(1, keepdim=True)
    return torch.cat([logits.gather(1, ids), tail], dim=1)


def manhattan(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Twin of ``distances.manhattan``: Σ_v |left[i, v] − right[j, v]| in float64, all differences at once ``[A, B, V]``."""
    return (left.double()[:, None] - right.double()[None]).abs().sum(2)


def column_sampled_cost(
    teacher: FullVocabulary, hidden: torch.Tensor, head: torch.Tensor, columns: int, generator: torch.Generator
) -> torch.Tensor:
    """Twin of ``group_costs.column_sampled_costs`` for one group of all rows: every logit made, the drawn ones taken."""
    chosen, weights = sampler_of_head(teacher.head_rows, min(teacher.vocabulary, len(head)), columns).draw(generator)
    return manhattan(teacher.logits()[:, chosen] * weights, (hidden @ head.T)[:, chosen] * weights)


def forward_kl_sampled(teacher: SampledTeacher, student_logits: torch.Tensor) -> torch.Tensor:
    """In the dtype of the logits."""
    log_s = student_logits[:, : teacher.vocabulary].log_softmax(1)
    sampled = teacher.sampled
    return -(sampled.weights * log_s.gather(1, sampled.ids)).sum(1) - sampled.entropy
