"""Knowledge distillation of responses: reg·cross-entropy + α·T²·KL(p_t ‖ p_s) at temperature T (Hinton et al., arXiv 1503.02531).

At T = 1 the KL is that of LLaVA-MoD's mimic stage (arXiv 2408.15881), on shifted response rows as everywhere here.
"""

from __future__ import annotations

from dataclasses import dataclass

from student_train.losses.divergences import forward_kl
from student_train.losses.terms import Terms
from student_train.methods.on_responses import response_terms
from student_train.methods.soft_targets import SoftTargets
from student_train.needs import Need

NAME = "kd"
PAPER = "Hinton et al., arXiv 1503.02531; LLaVA-MoD's mimic stage, arXiv 2408.15881"
STAGES = "PT,DFT"
TERMS = {
    "reg": "cross-entropy of the labels on response tokens",
    "res": "forward KL(p_t‖p_s) on response tokens",
}


@dataclass(frozen=True)
class KD(SoftTargets):
    """alpha: weight of the KL. reg: weight of the cross-entropy (0 leaves a term out). The other knobs: ``SoftTargets``."""

    alpha: float = 1.0
    reg: float = 1.0

    def needs(self) -> frozenset[Need]:
        return frozenset({Need("response_logits", temperature=self.temperature)} if self.alpha else ())

    def terms(self) -> Terms:
        weight = self.softened(self.alpha)
        return response_terms(self.reg, weight, lambda teacher, logits: forward_kl(teacher, logits, self.temperature))


PRESETS = {"paper": KD()}
