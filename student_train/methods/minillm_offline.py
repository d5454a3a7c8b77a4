"""MiniLLM (arXiv 2306.08543) without its sampling: α·KL(p_s ‖ p_t) token by token on the dataset's responses.

The paper's method draws the responses from the student and scores them by the teacher, every step: on-policy reinforcement learning,
which no cache can serve. What is left is its divergence, on the responses that the cache holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from student_train.losses.divergences import reverse_kl
from student_train.losses.terms import Terms
from student_train.methods.on_responses import check_knobs, response_terms
from student_train.needs import Need

NAME = "minillm-offline"
PAPER = "MiniLLM, arXiv 2306.08543 (its divergence, not its on-policy training)"
STAGES = "PT,DFT"


@dataclass(frozen=True)
class MiniLLMOffline:
    """alpha: weight of the reverse KL. reg: weight of the cross-entropy (0 leaves a term out). temperature: of both distributions."""

    alpha: float = 1.0
    reg: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_knobs(NAME, self.alpha, self.reg, self.temperature)

    def needs(self) -> frozenset[Need]:
        return frozenset({Need("response_logits", "reverse", self.temperature)} if self.alpha else ())

    def terms(self) -> Terms:
        return response_terms(
            self.reg, self.alpha, lambda teacher, logits: reverse_kl(teacher, logits, self.temperature)
        )


PRESETS = {"paper": MiniLLMOffline()}
