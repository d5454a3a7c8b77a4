"""LLaVA-KD (arXiv 2410.16236): reg·L_reg + α·L_res + β·L_vis + γ·L_rel in the stages DPT → SFT → DFT.

Teacher and student share the number of vision tokens. L_res, L_vis: forward KL, mean over rows; L_rel: 1 − cos of the Gram matrices
of raw vision logits, per sample. Presets: ``paper`` (α, β, γ = 1, 1, 0.5; all vision rows) and ``code`` (1, 1, 1; the released code
leaves out the first vision row of each sample, a CLS token that SigLIP does not have).
"""

from __future__ import annotations

from dataclasses import dataclass

from student_train.losses.divergences import forward_kl
from student_train.losses.relation import relation_cosine
from student_train.losses.terms import RowTerm, SampleTerm, Term, Terms, label_loss
from student_train.methods import Recipe
from student_train.methods.soft_targets import SoftTargets
from student_train.needs import Need
from teacher_cache.errors import KdcliError

NAME = "llava-kd"
PAPER = "LLaVA-KD, arXiv 2410.16236"
STAGES = "DPT,SFT,DFT"
TERMS = {
    "reg": "cross-entropy of the labels on response tokens",
    "res": "forward KL(p_t‖p_s) on response tokens",
    "vis": "forward KL(p_t‖p_s) on vision tokens",
    "rel": "relation: 1 − cosine of the Gram matrices of vision logits",
}


@dataclass(frozen=True)
class LlavaKD(SoftTargets):
    """alpha, beta, gamma: weights of response, vision and relation terms. reg: of the cross-entropy. 0 leaves a term out.

    drop_vision_rows: vision rows left out at the start of each sample. reduction: of both KLs, ``mean`` over rows (as the code does)
    or ``sum`` over a sample's rows (as the paper writes; 729 vision rows then weigh as much as 729 mean cross-entropies).
    """

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.5
    reg: float = 1.0
    drop_vision_rows: int = 0
    reduction: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction not in ("mean", "sum"):
            raise KdcliError(f"reduction must be mean or sum, got {self.reduction!r}")
        if self.drop_vision_rows < 0:
            raise KdcliError(f"drop_vision_rows must be at least 0, got {self.drop_vision_rows}")

    def needs(self) -> frozenset[Need]:
        weights = {
            Need("response_logits", temperature=self.temperature): self.alpha,
            Need("vision_logits", temperature=self.temperature): self.beta,
            Need("vision_relation"): self.gamma,
        }
        return frozenset(need for need, weight in weights.items() if weight)

    def terms(self) -> Terms:
        def kl(rows):
            return forward_kl(rows.need_teacher(), rows.logits, self.temperature)

        def relation(sample):
            return relation_cosine(sample.teacher_gram(), sample.student_gram())

        every: dict[str, Term] = {
            "reg": RowTerm(self.reg, "response", label_loss),
            "res": RowTerm(self.softened(self.alpha), "response", kl, sum_rows=self.reduction == "sum"),
            "vis": RowTerm(self.softened(self.beta), "vision", kl, self.drop_vision_rows, self.reduction == "sum"),
            "rel": SampleTerm(self.gamma, relation, skip_first=self.drop_vision_rows),
        }
        return {name: term for name, term in every.items() if term.weight}


PRESETS = {"paper": LlavaKD(), "code": LlavaKD(gamma=1.0, drop_vision_rows=1)}
RECIPES = {
    "paper": Recipe(
        "DPT,SFT,DFT",
        {"DPT": {"learning_rate": 1e-3}, "SFT": {"learning_rate": 2e-5}, "DFT": {"learning_rate": 2e-5}},
    )
}
