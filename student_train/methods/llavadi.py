"""LLaVADI (arXiv 2407.19409): hidden states of the last layer and logits, the two alignments that its study finds to matter.

reg + α·T²·KL(p_t ‖ p_s) + β·distance of the teacher's last hidden states and the student's, taken into the teacher's width by a learned
map; on response rows, vision rows by choice. Its affinity losses, which it finds to add nothing, are not here.

Otherwise than the released code: that takes the answer tokens themselves, here the shifted rows that predict them, as everywhere; and its
means are over the rows of a sample first, here over all rows of the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from student_train.losses.divergences import forward_kl, forward_kl_of_standardised
from student_train.losses.embedding import cosine_distance, squared_distance
from student_train.losses.terms import HiddenRows, HiddenTerm, RowTerm, Term, Terms, label_loss
from student_train.methods.soft_targets import SoftTargets
from student_train.needs import Need
from teacher_cache.errors import CompatibilityError, KdcliError

NAME = "llavadi"
PAPER = "LLaVADI, arXiv 2407.19409"
STAGES = "PT,DFT"
TERMS = {
    "reg": "cross-entropy of the labels on response tokens",
    "res": "forward KL(p_t‖p_s) on response tokens",
    "emb": "distance of last hidden states on response tokens",
    "emb_vis": "distance of last hidden states on vision tokens",
}
DISTANCES = {"mse": squared_distance, "cosine": cosine_distance}
MAPS = ("mlp", "linear")


@dataclass(frozen=True)
class LLaVADI(SoftTargets):
    """alpha, beta, vision: weights of the KL, of hidden states at response rows and at vision rows. reg: of the cross-entropy. 0 leaves a
    term out.

    distance: ``mse`` (mean over dimensions) or ``cosine`` (1 − cos). map: ``mlp`` (linear, GELU, linear) or ``linear``, from the
    student's width to the teacher's; one for both kinds of rows. norm_logits: standardise every row's logits on both sides before
    the KL, as the released script does.
    """

    alpha: float = 1.0
    beta: float = 1.0
    vision: float = 0.0
    reg: float = 1.0
    distance: str = "mse"
    map: str = "mlp"
    norm_logits: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for knob, choices in (("distance", tuple(DISTANCES)), ("map", MAPS)):
            if getattr(self, knob) not in choices:
                raise KdcliError(f"{knob} must be {' or '.join(choices)}, got {getattr(self, knob)!r}")

    def needs(self) -> frozenset[Need]:
        # Standardised, the loss is not linear in the teacher's probabilities: samples of them would not do.
        direction = "reverse" if self.norm_logits else "forward"
        weights = {
            Need("response_logits", direction, self.temperature): self.alpha,
            Need("response_hidden"): self.beta,
            Need("vision_hidden"): self.vision,
        }
        return frozenset(need for need, weight in weights.items() if weight)

    def maps(self, student_width: int, teacher_width: int) -> Mapping[str, nn.Module]:
        if not self.beta + self.vision:
            return {}
        widen = nn.Linear(student_width, teacher_width)
        if self.map == "linear":
            return {"hidden": widen}
        return {"hidden": nn.Sequential(widen, nn.GELU(), nn.Linear(teacher_width, teacher_width))}

    def check_student(self, config: Any, fields: Mapping[str, Any]) -> None:
        """CompatibilityError where the teacher's logits are known of some tokens alone, and the KL wants their mean and deviation."""
        if self.norm_logits and self.alpha and "response_hidden" not in fields:
            raise CompatibilityError(
                "llavadi: norm_logits needs every token's logit, which response_hidden serves, not "
                f"{', '.join(sorted(fields))}: capture response_hidden, or --set norm_logits=false"
            )

    def terms(self) -> Terms:
        divergence: Any = forward_kl_of_standardised if self.norm_logits else forward_kl

        def kl(rows):
            return divergence(rows.need_teacher(), rows.logits, self.temperature)

        def embedding(rows: HiddenRows) -> torch.Tensor:
            return DISTANCES[self.distance](rows.teacher, rows.maps["hidden"](rows.student))

        every: dict[str, Term] = {
            "reg": RowTerm(self.reg, "response", label_loss),
            "res": RowTerm(self.softened(self.alpha), "response", kl),
            "emb": HiddenTerm(self.beta, "response", embedding),
            "emb_vis": HiddenTerm(self.vision, "vision", embedding),
        }
        return {name: term for name, term in every.items() if term.weight}


PRESETS = {"paper": LLaVADI(), "code": LLaVADI(alpha=5.0, beta=5.0, norm_logits=True)}
