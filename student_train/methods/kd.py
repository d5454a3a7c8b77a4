"""Knowledge distillation of responses: reg·cross-entropy + α·T²·KL(p_t ‖ p_s) at temperature T (Hinton et al., arXiv 1503.02531).

At T = 1 the KL is that of LLaVA-MoD's mimic stage (arXiv 2408.15881), on shifted response rows as everywhere here.
"""

from __future__ import annotations

from dataclasses import dataclass

from student_train.losses.divergences import forward_kl
from student_train.losses.terms import Terms
from student_train.methods.on_responses import check_knobs, response_terms
from student_train.needs import Need

NAME = "kd"
PAPER = "Hinton et al., arXiv 1503.02531; LLaVA-MoD's mimic stage, arXiv 2408.15881"
STAGES = "PT,DFT"


@dataclass(frozen=True)
class KD:
    """alpha: weight of the KL. reg: weight of the cross-entropy (0 leaves a term out). temperature: of both distributions.

    temperature_squared: multiply the KL by T². Soft targets' gradients shrink as 1/T²; Hinton's factor keeps the balance with the
    cross-entropy where T is changed.
    """

    alpha: float = 1.0
    reg: float = 1.0
    temperature: float = 1.0
    temperature_squared: bool = True

    def __post_init__(self) -> None:
        check_knobs(NAME, self.alpha, self.reg, self.temperature)

    def needs(self) -> frozenset[Need]:
        return frozenset({Need("response_logits", temperature=self.temperature)} if self.alpha else ())

    def terms(self) -> Terms:
        weight = self.alpha * (self.temperature**2 if self.temperature_squared else 1.0)
        return response_terms(self.reg, weight, lambda teacher, logits: forward_kl(teacher, logits, self.temperature))


PRESETS = {"paper": KD()}
