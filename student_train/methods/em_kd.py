"""EM-KD (arXiv 2511.21106): α·L_sup + (1−α)·L_rld + β·L_vsd + γ·L_vlad, for a student with fewer vision tokens than the teacher.

VTM matches every vision row of the student with a teacher row (alignment.py), anew in every step. VSD: reverse KL on matched vision
rows; RLD: reverse KL on response rows; VLAD: SmoothL1 of the cosines of matched vision rows and text tokens. Phase 1 trains the
projector without distillation, phase 2 everything with it. Not published, so options: temperature, the text of VLAD, SmoothL1's β.

The hidden variants of the paper's ablation go through a learned linear map from the student's width to the teacher's, trained by the
hidden loss; where only the matching is on hidden states, that loss trains the map alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from student_train.alignment import MATCHINGS, Matching
from student_train.losses.affinity import affinity_loss, cosine_affinity
from student_train.losses.divergences import reverse_kl
from student_train.losses.matching import SPACES, UNMATCHED
from student_train.losses.terms import HiddenRows, HiddenTerm, RowTerm, SampleRows, SampleTerm, Term, Terms, label_loss
from student_train.needs import Need
from teacher_cache.errors import KdcliError

NAME = "em-kd"
PAPER = "EM-KD, arXiv 2511.21106"
STAGES = "PT,DFT"
COMPRESSOR = "adaptive_pool"
HIDDEN_MAP = "vision"
CHOICES = {"matching": MATCHINGS, "target": ("logits", "hidden"), "cost": SPACES, "text": ("response", "all")}


@dataclass(frozen=True)
class EMKD:
    """alpha: weight of the cross-entropy, 1 − alpha of RLD. beta: of VSD. gamma: of VLAD (0 leaves a term out).

    rld: False leaves RLD out and the cross-entropy at its weight (the ablation's rows before RLD).
    matching: ``hungarian-logits``, ``hungarian-hidden`` or ``pool`` (the mean of the teacher's tokens in a student token's cell).
    target: of VSD: ``logits``, or ``hidden`` (mean squared error through the learned map).
    cost: of the matching on ``logits``, or ``probs``. columns: vocabulary columns of an unbiased sampled cost, redrawn each step; 0: all.
    temperature: of both KLs. text: tokens of VLAD. smooth_l1_beta: where its square ends.
    max_teacher_rows: of one matching; of more, evenly spaced ones take part.
    """

    alpha: float = 0.5
    beta: float = 0.25
    gamma: float = 25.0
    rld: bool = True
    matching: str = "hungarian-logits"
    target: str = "logits"
    cost: str = "logits"
    columns: int = 0
    temperature: float = 1.0
    text: str = "response"
    smooth_l1_beta: float = 1.0
    max_teacher_rows: int = 2916

    def __post_init__(self) -> None:
        for knob, choices in CHOICES.items():
            if getattr(self, knob) not in choices:
                raise KdcliError(f"em-kd: {knob} must be {' or '.join(choices)}, got {getattr(self, knob)!r}")
        if not 0 < self.alpha <= 1 or min(self.beta, self.gamma) < 0:
            raise KdcliError("em-kd: alpha must be in (0, 1], beta and gamma at least 0")
        if not self.temperature > 0 or not self.smooth_l1_beta > 0 or self.max_teacher_rows < 1 or self.columns < 0:
            raise KdcliError(
                "em-kd: temperature and smooth_l1_beta must be above 0, max_teacher_rows at least 1, columns at least 0"
            )
        if self.columns and (self.cost != "logits" or self.matching != "hungarian-logits"):
            raise KdcliError(
                "em-kd: columns samples the cost of matching hungarian-logits on logits only; leave it at 0"
            )

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
        wanted = {
            Need("response_logits", "reverse", self.temperature): self._rld_weight > 0,
            Need("vision_logits", "reverse", self.temperature): bool(self.beta) and self.target == "logits",
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
        def kl(rows):
            return reverse_kl(rows.need_teacher(), rows.logits, self.temperature)

        on_logits = self.target == "logits"
        map_alone = self._uses_hidden and not (self.beta and self.target == "hidden")
        every: dict[str, Term] = {
            "sup": RowTerm(self.alpha, "response", label_loss),
            "rld": RowTerm(self._rld_weight, "response", kl),
            "vsd": RowTerm(self.beta, "vision", kl) if on_logits else HiddenTerm(self.beta, "vision", mapped_error),
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
