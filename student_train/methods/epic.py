"""What EPIC's two distillations share: one set of weights, two passes, the ratios that grow with progress (no method: no ``NAME``).

L = (1-λ)·L_SFT + λ·τ²·KL(p_tea ‖ p_stu), mean over response rows. The teacher pass has no gradient and removes fewer vision tokens.
With p = step / steps, r = fraction of vision tokens removed:

    r_stu ~ U(0.1 + 0.8·0.2p, 0.1 + 0.8·0.8p) each micro-batch,  r_tea = max(r_stu - min(0.1 + 0.5p, 0.3), 0)

Text rows are never removed, so teacher and student rows of a response stand beside each other whatever either pass removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from student_train.losses.divergences import forward_kl
from student_train.losses.terms import RowTerm, Terms, label_loss
from student_train.methods import Recipe
from student_train.methods.soft_targets import SoftTargets
from student_train.needs import Need
from student_train.pruning import Pruning, operator_module
from teacher_cache.errors import KdcliError

LEAST_REMOVED, SPAN = 0.1, 0.8
PAPER_RECIPE = Recipe(
    "PT,DFT", {"PT": {"learning_rate": 1e-3}, "DFT": {"learning_rate": 2e-5, "vision_tower_learning_rate": 2e-6}}
)
"""The paper's runs begin with LLaVA-1.5's projector, which is PT, and train the vision tower too."""


@dataclass(frozen=True)
class Epic(SoftTargets):
    """kd_weight: λ, of the KL; the cross-entropy weighs 1-λ. temperature: τ.

    operator: which vision tokens go (student_train/pruning). kd_rows: rows of the KL, ``response`` (they predict a response token) or
    ``answer`` (the response tokens themselves: the released code masks logits[t] by labels[t] without the shift).
    progressive: False trains at the end of the schedule from the first step on (the paper's ablation).
    """

    kd_weight: float = 0.7
    operator: str = "dart"
    kd_rows: str = "response"
    progressive: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.kd_weight <= 1.0:
            raise KdcliError(f"kd_weight must be from 0 to 1, got {self.kd_weight}")
        if self.kd_rows not in ("response", "answer"):
            raise KdcliError(f"kd_rows must be response or answer, got {self.kd_rows!r}")
        operator_module(self.operator)

    def needs(self) -> frozenset[Need]:
        return frozenset({Need("self_teacher")} if self.kd_weight else ())

    def terms(self) -> Terms:
        def kl(rows):
            return forward_kl(rows.need_self_teacher(), rows.logits, self.temperature)

        every = {
            "reg": RowTerm(1.0 - self.kd_weight, "response", label_loss),
            "self": RowTerm(self.softened(self.kd_weight), self.kd_rows, kl),
        }
        return {name: term for name, term in every.items() if term.weight}

    def reached(self, progress: float) -> float:
        """Where on the schedule a step stands."""
        return progress if self.progressive else 1.0

    def removed(self, progress: float, generator: torch.Generator) -> tuple[float, float]:
        """(student's, teacher's) fraction of vision tokens removed in one micro-batch."""
        least, most = (LEAST_REMOVED + SPAN * share * progress for share in (0.2, 0.8))
        student = least + (most - least) * float(torch.rand((), generator=generator))
        return student, max(student - min(0.1 + 0.5 * progress, 0.3), 0.0)

    def check_student(self, config: Any, fields: Mapping[str, Any]) -> None:
        """CompatibilityError or KdcliError where a student of this configuration cannot lose tokens so."""
        self.pruning(0.0).check(config)

    def pruning(self, removed: float) -> Pruning:
        """At the (lowest) layer of the method."""
        raise NotImplementedError
