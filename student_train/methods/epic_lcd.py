"""EPIC's layer consistency distillation (arXiv 2510.00515): the layer at which vision tokens are removed comes down from the last to ℓ_min.

ℓ = round(L - p·(L - ℓ_min)) with p = step / steps; nothing is removed while ℓ = L. No code is published: ℓ_min is an option, and the
ratios of both passes are those of the token distillation (the paper states their gap only).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from student_train.methods import Passes
from student_train.methods.epic import PAPER_RECIPE, Epic
from student_train.pruning import Descending, Pruning

NAME = "epic-lcd"
PAPER = "EPIC, arXiv 2510.00515 (no code published for it)"
STAGES = "PT,DFT"
TERMS = {
    "reg": "cross-entropy of the labels on response tokens",
    "self": "KL between passes of the same weights with more and with fewer vision tokens",
}


@dataclass(frozen=True)
class EpicLCD(Epic):
    """lowest_layer: ℓ_min, reached at the end of the stage. The other knobs: ``Epic``."""

    lowest_layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pruning(0.0)

    def pruning(self, removed: float) -> Pruning:
        return Pruning(self.operator, self.lowest_layer, removed=removed)

    def passes(self, progress: float, generator: torch.Generator) -> Passes:
        reached = self.reached(progress)
        student, teacher = (Descending(self.pruning(one), reached) for one in self.removed(reached, generator))
        return Passes(student, teacher, self_teacher=bool(self.kd_weight))


PRESETS = {"paper": EpicLCD()}
RECIPES = {"paper": PAPER_RECIPE}
