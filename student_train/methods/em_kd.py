"""EM-KD (arXiv 2511.21106): α·L_sup + (1−α)·L_rld + β·L_vsd + γ·L_vlad, for a student with fewer vision tokens than the teacher.

VTM matches every vision row of the student with a teacher row (alignment.py), anew in every step. VSD: reverse KL on matched vision
rows; RLD: reverse KL on response rows (``divergence`` changes both); VLAD: SmoothL1 of the cosines of matched vision rows and text
tokens. Phase 1 trains the projector without distillation, phase 2 everything with it. Not published, so options: temperature, the text
of VLAD, SmoothL1's β.

The hidden variants of the paper's ablation go through a learned linear map from the student's width to the teacher's, trained by the
hidden loss; where only the matching is on hidden states, that loss trains the map alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from student_train.alignment import MATCHINGS, Matching
from student_train.losses.affinity import affinity_loss, cosine_affinity
from student_train.losses.divergences import forward_kl, jensen_shannon, reverse_kl
from student_train.losses.matching import SPACES, UNMATCHED
from student_train.losses.terms import HiddenRows, HiddenTerm, RowTerm, SampleRows, SampleTerm, Term, Terms, label_loss
from student_train.methods import Recipe
from student_train.methods.soft_targets import SoftTargets
from student_train.needs import Need
from teacher_cache.errors import KdcliError

NAME = "em-kd"
PAPER = "EM-KD, arXiv 2511.21106"
STAGES = "PT,DFT"
TERMS = {
    "sup": "cross-entropy of the labels on response tokens",
    "rld": "divergence on response tokens (reverse KL by default)",
    "vsd": "divergence, or squared error of hidden states, on matched vision tokens",
    "vlad": "difference of cosines between matched vision tokens and text tokens",
    "map": "squared error of matched hidden states, which trains the learned map",
}
COMPRESSOR = "adaptive_pool"
HIDDEN_MAP = "vision"
DIVERGENCES: dict[str, Any] = {"forward": forward_kl, "reverse": reverse_kl, "jsd": jensen_shannon}
CHOICES = {
    "divergence": tuple(DIVERGENCES),
    "matching": MATCHINGS,
    "target": ("logits", "hidden"),
    "cost": SPACES,
    "text": ("response", "all"),
}


@dataclass(frozen=True)
class EMKD(SoftTargets):
    """alpha: weight of the cross-entropy, 1 − alpha of RLD. beta: of VSD. gamma: of VLAD (0 leaves a term out).

    divergence: of VSD and RLD: ``reverse`` KL(p_s ‖ p_t) as in the paper, ``forward`` KL(p_t ‖ p_s), or ``jsd`` (β = 1/2).
    rld: False leaves RLD out and the cross-entropy at its weight (the ablation's rows before RLD).
    matching: ``hungarian-logits``, ``hungarian-hidden`` or ``pool`` (the mean of the teacher's tokens in a student token's cell).
    target: of VSD: ``logits``, or ``hidden`` (mean squared error through the learned map).
    cost: of the matching on ``logits``, or ``probs``. columns: vocabulary columns of an unbiased sampled cost, redrawn each step; 0: all.
    text: tokens of VLAD. smooth_l1_beta: where its square ends.
    max_teacher_rows: of one matching; of more, evenly spaced ones take part.
    """

    alpha: float = 0.5
    beta: float = 0.25
    gamma: float = 25.0
    divergence: str = "reverse"
    rld: bool = True
    matching: str = "hungarian-logits"
    target: str = "logits"
    cost: str = "logits"
    columns: int = 0
    text: str = "response"
    smooth_l1_beta: float = 1.0
    max_teacher_rows: int = 2916

    def __post_init__(self) -> None:
        super().__post_init__()
        for knob, choices in CHOICES.items():
            if getattr(self, knob) not in choices:
                raise KdcliError(f"{knob} must be {' or '.join(choices)}, got {getattr(self, knob)!r}")
        if not 0 < self.alpha <= 1:
            raise KdcliError(f"alpha must be in (0, 1], got {self.alpha:g}")
        if not self.smooth_l1_beta > 0 or self.max_teacher_rows < 1 or self.columns < 0:
            raise KdcliError("smooth_l1_beta must be above 0, max_teacher_rows at least 1, columns at least 0")
        if self.columns and (self.cost != "logits" or self.matching != "hungarian-logits"):
            raise KdcliError("columns samples the cost of matching hungarian-logits on logits only; leave it at 0")

    @property
    def _rld_weight(self) -> float:
        return (1.0 - self.alpha) if self.rld else 0.0

    @property
    def _uses_hidden(self) -> bool:
        return bool(self.beta and self.target == "hidden") or (self._matches and self.matching == "hungarian-hidden")

    @property
    def _pools_logits(self) -> bool:
        return bool(self.beta and self.target == "logits" and self.matching == "pool")

    @property
    def _matches(self) -> bool:
        return bool(self.beta or self.gamma)

    def needs(self) -> frozenset[Need]:
        direction = "forward" if self.divergence == "forward" else "reverse"
        wanted = {
            Need("response_logits", direction, self.temperature): self._rld_weight > 0,
            Need("vision_logits", direction, self.temperature): bool(self.beta) and self.target == "logits",
            Need("vision_raw_logits"): (self._matches and self.matching == "hungarian-logits") or self._pools_logits,
            Need("vision_hidden"): self._uses_hidden,
            Need("vision_text_affinity", text=self.text): bool(self.gamma),
        }
        return frozenset(need for need, asked in wanted.items() if asked)

    def alignment(self) -> Matching | None:
        """VTM; None where no term looks at vision rows."""
        if not self._matches:
            return None
        return Matching(self.matching, self.cost, self.columns, self.max_teacher_rows, HIDDEN_MAP)

    def maps(self, student_width: int, teacher_width: int) -> dict[str, nn.Module]:
        """The student's vision rows in the teacher's width."""
        return {HIDDEN_MAP: nn.Linear(student_width, teacher_width)} if self._uses_hidden else {}

    def terms(self) -> Terms:
        def divergence(rows):
            return DIVERGENCES[self.divergence](rows.need_teacher(), rows.logits, temperature=self.temperature)

        on_logits = self.target == "logits"
        map_alone = self._uses_hidden and not (self.beta and self.target == "hidden")
        every: dict[str, Term] = {
            "sup": RowTerm(self.alpha, "response", label_loss),
            "rld": RowTerm(self.softened(self._rld_weight), "response", divergence),
            "vsd": RowTerm(self.softened(self.beta), "vision", divergence)
            if on_logits
            else HiddenTerm(self.beta, "vision", mapped_error),
            "vlad": SampleTerm(self.gamma, self.vlad, rows=("vision", "text")),
            "map": HiddenTerm(1.0 if map_alone else 0.0, "vision", mapped_error_of_map),
        }
        return {name: term for name, term in every.items() if term.weight}

    def vlad(self, sample: SampleRows) -> torch.Tensor:
        """mean SmoothL1(A_t − A_s) over the matched rows and the text tokens, a float32 scalar; 0 where no entry is left."""
        theirs, ours = sample.text_tokens(self.text)
        cosines = cosine_affinity(sample.hidden("vision"), sample.hidden("text")[ours])
        kept = sample.matched()
        rows = torch.where(kept, torch.arange(len(kept), device=kept.device), UNMATCHED)
        return affinity_loss(sample.affinity(), cosines, rows, theirs, self.smooth_l1_beta)


def mapped_error(rows: HiddenRows) -> torch.Tensor:
    """Mean squared error over the width of the mapped student row to the teacher row ``[R]``."""
    return (rows.maps[HIDDEN_MAP](rows.student) - rows.teacher).square().mean(1)


def mapped_error_of_map(rows: HiddenRows) -> torch.Tensor:
    """The same, with gradient to the map only: it is what the matching looks through."""
    return mapped_error(HiddenRows(rows.student.detach(), rows.teacher, rows.maps))


PRESETS = {"paper": EMKD()}
RECIPES = {"paper": Recipe("PT,DFT", {"PT": {"learning_rate": 1e-3}, "DFT": {"learning_rate": 2e-5}})}
