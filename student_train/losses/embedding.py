"""Distances of hidden states, row by row (LLaVADI's feature embedding distillation, arXiv 2407.19409)."""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity


def squared_distance(teacher_RD: torch.Tensor, student_RD: torch.Tensor) -> torch.Tensor:
    """``[R]``: mean over dimensions of the squared difference."""
    return (student_RD - teacher_RD).square().mean(dim=1)


def cosine_distance(teacher_RD: torch.Tensor, student_RD: torch.Tensor) -> torch.Tensor:
    """``[R]``: 1 − cos."""
    return 1.0 - cosine_similarity(student_RD, teacher_RD, dim=1)
