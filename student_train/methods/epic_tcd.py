"""EPIC's token consistency distillation (arXiv 2510.00515): at a fixed layer, more and more vision tokens are removed.

Presets: ``paper`` (λ = 0.7) and ``code`` (λ = 0.5, as released for DART and FastV; 0.4 for random; the KL on unshifted rows).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from student_train.methods import Passes
from student_train.methods.epic import PAPER_RECIPE, Epic
from student_train.pruning import Pruning

NAME = "epic-tcd"
PAPER = "EPIC, arXiv 2510.00515"
STAGES = "PT,DFT"
TERMS = {
    "reg": "cross-entropy of the labels on response tokens",
    "self": "KL between passes of the same weights with more and with fewer vision tokens",
}


@dataclass(frozen=True)
class EpicTCD(Epic):
    """layer: K, from which on both passes see fewer vision tokens. The other knobs: ``Epic``."""

    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pruning(0.0)

    def pruning(self, removed: float) -> Pruning:
        return Pruning(self.operator, self.layer, removed=removed)

    def passes(self, progress: float, generator: torch.Generator) -> Passes:
        student, teacher = self.removed(self.reached(progress), generator)
        return Passes(self.pruning(student), self.pruning(teacher), self_teacher=bool(self.kd_weight))


PRESETS = {"paper": EpicTCD(), "code": EpicTCD(kd_weight=0.5, kd_rows="answer")}
RECIPES = {"paper": PAPER_RECIPE}
