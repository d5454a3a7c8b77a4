"""EM-KD's vision-language affinity distillation (VLAD, arXiv 2511.21106): how every vision token relates to every text token."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize, smooth_l1_loss

from student_train.losses.matching import UNMATCHED
from student_train.losses.precision import wide


def cosine_affinity(vision: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """A[j, n] = cos(vision_j, text_n), float32 ``[N_s, N_text]`` with gradient to both.

    Args:
        vision: the student's last hidden states at its vision tokens ``[N_s, D]``. text: at the chosen text tokens themselves
            (not shifted, as the ``affinity`` field has them) ``[N_text, D]``.
    """
    return normalize(wide(vision), dim=1) @ normalize(wide(text), dim=1).T


def affinity_loss(
    teacher: torch.Tensor, student: torch.Tensor, matched: torch.Tensor, text: torch.Tensor, beta: float = 1.0
) -> torch.Tensor:
    """mean SmoothL1(A_t[matched rows][:, text] − A_s) of one sample, a float32 scalar; 0 where no entry is left.

    SmoothL1(x) = x²/2β for |x| < β, else |x| − β/2: with β = 1 nearly always the square, since cosines differ by 2 at most. The mean
    is what makes the paper's weight of 25 sensible.

    Args:
        teacher: ``[N_t, N]`` over all text tokens. student: ``[N_s, N_text]`` of ``cosine_affinity``.
        matched: ``[N_s]`` teacher rows (``matching.match``); rows without one are left out.
        text: which of the N text tokens the student's columns are: indices ``[N_text]``, or a mask ``[N]`` with N_text set.
    """
    has_teacher = matched != UNMATCHED
    target = wide(teacher[matched[has_teacher]][:, text])
    if not target.numel():
        return student.sum() * 0.0
    return smooth_l1_loss(student[has_teacher], target, beta=beta)
