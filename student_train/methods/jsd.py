"""Generalised Jensen-Shannon divergence, GKD's (arXiv 2306.13649), token by token on the dataset's responses.

β·KL(p_t ‖ m) + (1−β)·KL(p_s ‖ m), m = β·p_t + (1−β)·p_s: small β pulls as the forward KL does, β near 1 as the reverse KL. GKD's
student-made responses need the live teacher and are not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from student_train.losses.divergences import jensen_shannon
from student_train.losses.terms import Terms
from student_train.methods.on_responses import response_terms
from student_train.methods.soft_targets import SoftTargets
from student_train.needs import Need
from teacher_cache.errors import KdcliError

NAME = "jsd"
PAPER = "GKD, arXiv 2306.13649 (its divergence, not its on-policy training)"
STAGES = "PT,DFT"
TERMS = {
    "reg": "cross-entropy of the labels on response tokens",
    "res": "generalised Jensen-Shannon divergence on response tokens",
}


@dataclass(frozen=True)
class JSD(SoftTargets):
    """alpha: weight of the divergence. reg: weight of the cross-entropy (0 leaves a term out). The other knobs: ``SoftTargets``.

    beta: in (0, 1). The divergence itself vanishes at both ends, as β and as 1−β: raise ``alpha`` by as much.
    """

    alpha: float = 1.0
    reg: float = 0.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.beta < 1.0:
            raise KdcliError(f"beta must be in (0, 1), got {self.beta}; its ends are methods kd and minillm-offline")

    def needs(self) -> frozenset[Need]:
        return frozenset({Need("response_logits", "reverse", self.temperature)} if self.alpha else ())

    def terms(self) -> Terms:
        weight = self.softened(self.alpha)
        return response_terms(
            self.reg, weight, lambda teacher, logits: jensen_shannon(teacher, logits, self.beta, self.temperature)
        )


PRESETS = {"paper": JSD()}
