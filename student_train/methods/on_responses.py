"""What the methods on response tokens share: cross-entropy beside one divergence (no method itself: it has no ``NAME``)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from student_train.distributions import Distribution
from student_train.losses.terms import RowTerm, Terms, label_loss


def response_terms(
    reg: float, weight: float, divergence: Callable[[Distribution, torch.Tensor], torch.Tensor]
) -> Terms:
    """reg·cross-entropy + weight·divergence(teacher rows, student logits ``[C, V]``) -> ``[C]``; a weight of 0 leaves its term out."""
    every = {
        "reg": RowTerm(reg, "response", label_loss),
        "res": RowTerm(weight, "response", lambda rows: divergence(rows.need_teacher(), rows.logits)),
    }
    return {name: term for name, term in every.items() if term.weight}
