"""Align-KD (arXiv 2412.01282): what text looks at in the first layer, and the vision features that it looks at, beside the logits.

reg + α·T²·KL(p_t ‖ p_s) on responses + β·MSE of vision features + focus·MSE of the ``top_k`` vision features that the teacher's text pays
most + γ·MSE of the first layer's text→vision attention. Features are the projector's outputs, the teacher's taken into the student's
width by a learned linear map. All weights are 1, as in the released code.

Otherwise than the released code: it sends the teacher's heads through a learned map to the student's, here the means over heads are
compared (or each, where the counts are equal). Its mask takes vision tokens as queries and text tokens as keys, which a causal model
leaves at 0 where the image stands first; here text tokens are the queries, as the paper's words have it. Its KL runs over all positions,
here over responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from student_train.losses.divergences import forward_kl
from student_train.losses.first_layer import attention_mse, feature_mse, looked_at
from student_train.losses.terms import RowTerm, SampleRows, SampleTerm, Term, Terms, label_loss
from student_train.methods.soft_targets import SoftTargets
from student_train.needs import Need
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.models.text_vision import check_layers
from teacher_cache.wants import Wants

NAME = "align-kd"
PAPER = "Align-KD, arXiv 2412.01282"
STAGES = "DPT,DFT"
TERMS = {
    "reg": "cross-entropy of the labels on response tokens",
    "res": "forward KL(p_t‖p_s) on response tokens",
    "vis": "squared error of vision features",
    "focus": "squared error of the features of the most attended vision tokens",
    "att": "squared error of first-layer attention from text to vision tokens",
}


@dataclass(frozen=True)
class AlignKD(SoftTargets):
    """alpha, beta, focus, gamma: weights of KL, all features, the features looked at, attention. reg: of the cross-entropy. 0 leaves a term
    out.

    top_k: how many vision tokens are looked at.
    heads: ``mean``, or ``each`` where teacher and student have as many. text: which text tokens' attention counts, ``all`` (needs the
    teacher's prompts) or ``response``.
    """

    alpha: float = 1.0
    beta: float = 1.0
    focus: float = 1.0
    gamma: float = 1.0
    reg: float = 1.0
    top_k: int = 16
    heads: str = "mean"
    text: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        for knob, choices in (("heads", ("mean", "each")), ("text", ("all", "response"))):
            if getattr(self, knob) not in choices:
                raise KdcliError(f"{knob} must be {' or '.join(choices)}, got {getattr(self, knob)!r}")
        if self.top_k < 1:
            raise KdcliError(f"top_k must be at least 1, got {self.top_k}")

    def needs(self) -> frozenset[Need]:
        weights = {
            Need("response_logits", temperature=self.temperature): self.alpha,
            Need("vision_features"): self.beta + self.focus,
            Need("text_vision_attention"): self.focus + self.gamma,
        }
        return frozenset(need for need, weight in weights.items() if weight)

    def maps(self, student_width: int, teacher_width: int) -> Mapping[str, torch.nn.Module]:
        return {"features": torch.nn.Linear(teacher_width, student_width)} if self.beta + self.focus else {}

    def check_student(self, config: Any, fields: Mapping[str, Any]) -> None:
        """CompatibilityError where the student's first layer is of an unknown kind, or its heads have no counterpart in the cache."""
        if not self.focus + self.gamma:
            return
        check_layers(Wants(attention={0: "each"}), config)
        if self.gamma and self.heads == "each" and fields["attention"]["params"].get("heads") == "mean":
            raise CompatibilityError(
                "align-kd: heads=each, but field attention holds the mean over heads: --set heads=mean, or another cache"
            )

    def terms(self) -> Terms:
        def kl(rows):
            return forward_kl(rows.need_teacher(), rows.logits, self.temperature)

        every: dict[str, Term] = {
            "reg": RowTerm(self.reg, "response", label_loss),
            "res": RowTerm(self.softened(self.alpha), "response", kl),
            "vis": SampleTerm(self.beta, self._features, asks=("features",)),
            "focus": SampleTerm(self.focus, self._focused_features, asks=("features",)),
            "att": SampleTerm(self.gamma, self._attention, asks=("attention",)),
        }
        return {name: term for name, term in every.items() if term.weight}

    def _features(self, sample: SampleRows) -> torch.Tensor:
        return feature_mse(sample.maps("features")(sample.teacher_features()), sample.features())

    def _focused_features(self, sample: SampleRows) -> torch.Tensor:
        theirs, _ = self._seeing_text(sample)
        chosen = looked_at(sample.attention()[:, theirs], self.top_k)
        return feature_mse(sample.maps("features")(sample.teacher_features()[chosen]), sample.features()[chosen])

    def _attention(self, sample: SampleRows) -> torch.Tensor:
        theirs, ours = self._seeing_text(sample)
        return attention_mse(sample.attention()[:, theirs], sample.student_attention()[:, ours], self.heads)

    def _seeing_text(self, sample: SampleRows) -> tuple[torch.Tensor, torch.Tensor]:
        """(teacher's, student's) indices of the text tokens behind the first image: those before it pay nothing on either side."""
        theirs, ours = sample.text_tokens(self.text)
        seeing = theirs >= sample.teacher.text[sample.number].image_at[0]
        return theirs[seeing], ours[seeing]


PRESETS = {"paper": AlignKD()}
