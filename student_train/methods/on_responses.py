"""What the methods on response tokens share: cross-entropy beside one divergence (no method itself: it has no ``NAME``)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from student_train.distributions import Distribution
from student_train.losses.terms import RowTerm, Terms, label_loss
from teacher_cache.errors import KdcliError


def response_terms(
    reg: float, weight: float, divergence: Callable[[Distribution, torch.Tensor], torch.Tensor]
) -> Terms:
    """reg·cross-entropy + weight·divergence(teacher rows, student logits ``[C, V]``) -> ``[C]``; a weight of 0 leaves its term out."""
    every = {
        "reg": RowTerm(reg, "response", label_loss),
        "res": RowTerm(weight, "response", lambda rows: divergence(rows.need_teacher(), rows.logits)),
    }
    return {name: term for name, term in every.items() if term.weight}


def check_knobs(method: str, alpha: float, reg: float, temperature: float) -> None:
    """KdcliError where nothing would be learned, or anything pushed away from the teacher."""
    if min(alpha, reg) < 0 or not alpha + reg > 0:
        raise KdcliError(f"{method}: alpha and reg must be at least 0 and not both 0, got {alpha} and {reg}")
    if not temperature > 0:
        raise KdcliError(f"{method}: temperature must be above 0, got {temperature}")
