"""DistiLLM (arXiv 2402.03898) without student-made responses: its skewed KL, token by token on the dataset's responses.

``forward``: KL(p_t ‖ s·p_t + (1−s)·p_s); ``reverse``: KL(p_s ‖ (1−s)·p_t + s·p_s); s = ``skew``. The paper's adaptive off-policy branch
lets the teacher score responses that the student makes on the way, which no cache can serve.
"""

from __future__ import annotations

from dataclasses import dataclass

from student_train.losses.divergences import skew_kl, skew_reverse_kl
from student_train.losses.terms import Terms
from student_train.methods.on_responses import response_terms
from student_train.methods.soft_targets import SoftTargets
from student_train.needs import Need
from teacher_cache.errors import KdcliError

NAME = "distillm-offline"
PAPER = "DistiLLM, arXiv 2402.03898 (its divergences, not its student-made responses)"
STAGES = "PT,DFT"
TERMS = {
    "reg": "cross-entropy of the labels on response tokens",
    "res": "skewed KL on response tokens",
}
DIVERGENCES = {"forward": skew_kl, "reverse": skew_reverse_kl}


@dataclass(frozen=True)
class DistiLLMOffline(SoftTargets):
    """alpha: weight of the skewed KL. reg: weight of the cross-entropy (0 leaves a term out). The other knobs: ``SoftTargets``.

    direction: ``forward`` (SKL) or ``reverse`` (SRKL); the released scripts use one or the other by model family.
    skew: share of the left side in the mixture, in (0, 1); at 0 it would be the plain KL (methods kd and minillm-offline).
    """

    alpha: float = 1.0
    reg: float = 0.0
    direction: str = "forward"
    skew: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction not in DIVERGENCES:
            raise KdcliError(f"direction must be forward or reverse, got {self.direction!r}")
        if not 0.0 < self.skew < 1.0:
            raise KdcliError(f"skew must be in (0, 1), got {self.skew}")

    def needs(self) -> frozenset[Need]:
        # The student is in the mixture of both directions: samples of the teacher alone serve neither.
        return frozenset({Need("response_logits", "reverse", self.temperature)} if self.alpha else ())

    def terms(self) -> Terms:
        skewed = DIVERGENCES[self.direction]
        return response_terms(
            self.reg,
            self.softened(self.alpha),
            lambda teacher, logits: skewed(teacher, logits, self.skew, self.temperature),
        )


PRESETS = {"paper": DistiLLMOffline()}
