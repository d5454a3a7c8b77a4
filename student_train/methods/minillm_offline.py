"""MiniLLM (arXiv 2306.08543) without its sampling: α·KL(p_s ‖ p_t) token by token on the dataset's responses.

The paper's method draws the responses from the student and scores them by the teacher, every step: on-policy reinforcement learning,
which no cache can serve. What is left is its divergence, on the responses that the cache holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from student_train.losses.divergences import reverse_kl
from student_train.losses.terms import Terms
from student_train.methods.on_responses import response_terms
from student_train.methods.soft_targets import SoftTargets
from student_train.needs import Need

NAME = "minillm-offline"
PAPER = "MiniLLM, arXiv 2306.08543 (its divergence, not its on-policy training)"
STAGES = "PT,DFT"
TERMS = {
    "reg": "cross-entropy of the labels on response tokens",
    "res": "reverse KL(p_s‖p_t) on response tokens",
}


@dataclass(frozen=True)
class MiniLLMOffline(SoftTargets):
    """alpha: weight of the reverse KL. reg: weight of the cross-entropy (0 leaves a term out). The other knobs: ``SoftTargets``."""

    alpha: float = 1.0
    reg: float = 0.0

    def needs(self) -> frozenset[Need]:
        return frozenset({Need("response_logits", "reverse", self.temperature)} if self.alpha else ())

    def terms(self) -> Terms:
        weight = self.softened(self.alpha)
        return response_terms(self.reg, weight, lambda teacher, logits: reverse_kl(teacher, logits, self.temperature))


PRESETS = {"paper": MiniLLMOffline()}
