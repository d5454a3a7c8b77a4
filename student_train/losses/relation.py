"""LLaVA-KD's relation loss (arXiv 2410.16236): 1 − cos of the flattened Gram matrices of raw vision logits."""

from __future__ import annotations

import torch

from student_train.losses.precision import wide


def relation_cosine(teacher_gram: torch.Tensor, student_gram: torch.Tensor) -> torch.Tensor:
    """1 − ⟨R_t, R_s⟩ / (‖R_t‖ ‖R_s‖), a float32 scalar per sample; Gram entries overflow float16, so float32 throughout."""
    teacher, student = wide(teacher_gram.flatten()), wide(student_gram.flatten())
    teacher = teacher / teacher.norm().clamp_min(1e-30)
    student = student / student.norm().clamp_min(1e-30)
    return 1.0 - torch.dot(teacher, student)
