"""Losses on what goes into the language model's first layer and what its text looks at (Align-KD, arXiv 2412.01282).

H heads, N text tokens, R vision tokens of one sample.
"""

from __future__ import annotations

import torch

from student_train.losses.precision import wide
from teacher_cache.errors import CompatibilityError


def attention_mse(teacher_HNR: torch.Tensor, student_HNR: torch.Tensor, heads: str) -> torch.Tensor:
    """Mean squared difference of two maps. heads: ``mean`` (of their means over heads, whatever the counts) or ``each``.

    Raises:
        CompatibilityError: ``each``, and the counts of heads differ.
    """
    if heads == "mean":
        teacher_HNR, student_HNR = (one.mean(dim=0, keepdim=True) for one in (teacher_HNR, student_HNR))
    elif len(teacher_HNR) != len(student_HNR):
        raise CompatibilityError(
            f"the teacher's attention is stored with {len(teacher_HNR)} heads, the student has {len(student_HNR)}: use --set heads=mean"
        )
    # Mean over no entries (an image behind all text) would be NaN.
    return (student_HNR - teacher_HNR).square().sum() / max(1, student_HNR.numel())


def looked_at(teacher_HNR: torch.Tensor, k: int) -> torch.Tensor:
    """int64 ``[min(k, R)]``: the vision tokens that text pays most, summed over text tokens, mean over heads; the first of equals first."""
    paid = teacher_HNR.mean(dim=0).sum(dim=0)
    return paid.argsort(descending=True, stable=True)[:k]


def feature_mse(teacher_RD: torch.Tensor, student_RD: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of features of equal width."""
    return (wide(student_RD) - wide(teacher_RD)).square().mean()
