"""Divergences between teacher and student rows. All return float32 ``[R]`` in nats, with gradients to the student's logits.

Teachers: any of full vocabulary, at any temperature; top-k with its exact tail (``HeadAndTail``), at temperature 1. There everything
outside the head is one outcome on both sides, so every divergence is a lower bound of the dense one (log-sum inequality, which holds
for every f-divergence) and exact where the head is the whole vocabulary. The forward KL loses the tail's own divergence weighed by
the teacher's tail mass; the others lose it weighed by the student's too, which may be large.

The student's softmax runs over the vocabulary that both sides have: columns beyond the teacher's are padding of the head.
p_t, p_s are the distributions at the temperature; nothing is multiplied by T².
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch

from student_train.distributions import Distribution, FullVocabulary, HeadAndTail, SampledTeacher, is_full
from student_train.losses import written
from student_train.losses.precision import wide
from student_train.losses.sampled import forward_kl_sampled
from teacher_cache.errors import CompatibilityError

LOG_NOTHING = -1e5
"""Log-prob of a teacher's tail that is empty: below every difference of logits, and small enough to stay finite in every product."""


def cross_entropy(student_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−log p_s(label) ``[R]`` from logits ``[R, V]``."""
    return written.WithGradient.apply(written.cross_entropy, (labels,), wide(student_logits))


def forward_kl(teacher: Distribution, student_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(p_t ‖ p_s) ``[R]``; from samples (``*_sampled``) an unbiased estimate, at temperature 1."""
    if isinstance(teacher, SampledTeacher):
        return forward_kl_sampled(teacher, student_logits, temperature)
    return _rows(written.forward_kl, teacher, student_logits, temperature)


def forward_kl_of_standardised(
    teacher: FullVocabulary, student_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """KL(p_t ‖ p_s) ``[R]`` of logits that are ``standardised`` on both sides, over the vocabulary that both have."""
    logits = standardised(wide(student_logits)[:, : teacher.vocabulary])
    # Log-probs are logits but for a constant, which the mean takes along.
    log_probs = torch.log_softmax(standardised(wide(teacher.log_probs())) / temperature, dim=1)
    return written.WithGradient.apply(written.forward_kl, (log_probs,), logits, None, temperature)


def standardised(logits: torch.Tensor) -> torch.Tensor:
    """``[R, V]`` less the row's mean, over 1e-7 + its standard deviation (of V − 1), as LLaVADI's released code has it."""
    return (logits - logits.mean(dim=1, keepdim=True)) / (1e-7 + logits.std(dim=1, keepdim=True))


def reverse_kl(teacher: Distribution, student_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(p_s ‖ p_t) ``[R]``: MiniLLM's divergence (arXiv 2306.08543) on given tokens."""
    return _rows(written.reverse_kl, teacher, student_logits, temperature)


def jensen_shannon(
    teacher: Distribution, student_logits: torch.Tensor, beta: float = 0.5, temperature: float = 1.0
) -> torch.Tensor:
    """β·KL(p_t ‖ m) + (1−β)·KL(p_s ‖ m), m = β·p_t + (1−β)·p_s ``[R]``, 0 < β < 1 (GKD, arXiv 2306.13649, eq. 1).

    It vanishes at both ends; divided by β it tends to the forward KL(p_t ‖ p_s) as β → 0, divided by 1−β to the reverse
    KL(p_s ‖ p_t) as β → 1. At β = 1/2 it is the symmetric Jensen-Shannon divergence, at most log 2.
    """
    return _rows(partial(written.jensen_shannon, beta=beta), teacher, student_logits, temperature)


def skew_kl(
    teacher: Distribution, student_logits: torch.Tensor, skew: float = 0.1, temperature: float = 1.0
) -> torch.Tensor:
    """KL(p_t ‖ α·p_t + (1−α)·p_s) ``[R]``, α = ``skew`` in (0, 1): DistiLLM's SKL (arXiv 2402.03898); at most −log α."""
    return _rows(partial(written.skew_kl, skew=skew), teacher, student_logits, temperature)


def skew_reverse_kl(
    teacher: Distribution, student_logits: torch.Tensor, skew: float = 0.1, temperature: float = 1.0
) -> torch.Tensor:
    """KL(p_s ‖ (1−α)·p_t + α·p_s) ``[R]``, α = ``skew`` in (0, 1): DistiLLM's SRKL; at most −log α.

    α is the share of the left argument in the mixture for both skews: α = 0 would be the plain KL of either direction.
    """
    return _rows(partial(written.skew_reverse_kl, skew=skew), teacher, student_logits, temperature)


def _rows(
    divergence: written.Divergence, teacher: Distribution, student_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Over the vocabulary, or over the K + 1 outcomes of a head and its tail."""
    logits = wide(student_logits)
    if is_full(teacher):
        log_probs = wide(cast(FullVocabulary, teacher).log_probs(temperature))
        if log_probs.shape[1] > logits.shape[1]:
            raise CompatibilityError(
                f"the teacher's vocabulary has {log_probs.shape[1]} tokens, the student's head {logits.shape[1]} rows"
            )
        return written.WithGradient.apply(divergence, (log_probs,), logits, log_probs.shape[1], temperature)
    if not isinstance(teacher, HeadAndTail):
        raise TypeError(f"no divergence from {type(teacher).__name__}")
    if temperature != 1.0:
        raise CompatibilityError(
            "a top-k field is valid at temperature 1 only: capture response_hidden and vision_hidden, or --set temperature=1.0"
        )
    topk = teacher.topk
    log_tail = topk.log_tail.clamp_min(LOG_NOTHING)[:, None]
    log_probs = torch.cat([topk.log_probs, log_tail], dim=1).to(torch.float32)
    merged = written.MergeTail.apply(topk.ids, logits, teacher.vocabulary)
    return written.WithGradient.apply(divergence, (log_probs,), merged)
