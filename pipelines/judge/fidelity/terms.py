"""The losses that are compared, each as (where rows are compared, its values): the papers' terms over one sample.

A ``Term`` is given the student's side of one sample and the teacher's view of it, and returns ``(point, values)``: ``point`` is the
tensor whose gradient is compared row by row, ``values`` the loss per row, or one number of the whole sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d

from student_train.losses.affinity import affinity_loss, cosine_affinity
from student_train.losses.divergences import forward_kl, jensen_shannon, reverse_kl
from student_train.losses.matching import matched_reverse_kl
from student_train.losses.relation import relation_cosine
from student_train.needs import Need
from student_train.teacher_view import TeacherView
from teacher_cache.models.head import head_logits
from teacher_cache.records import ImageLayout

POOL = 2
"""Side of the square of vision tokens that EM-KD's student averages into one."""


@dataclass(frozen=True)
class StudentSide:
    """The student's side of one sample.

    Attributes:
        hidden: ``response``, ``vision``, ``text`` → leaves ``[R, D]``. head: ``[V, D]``, a leaf with gradient where it is trained.
        cap: of its logits, as ``StudentRows`` has it.
        layout: of its vision tokens. response: bool ``[N]``, the text tokens that are labels, for teacher and student.
        pools: its vision tokens are pooled before they are matched (it has as many as the teacher).
    """

    hidden: Mapping[str, torch.Tensor]
    head: torch.Tensor
    layout: tuple[ImageLayout, ...]
    response: tuple[torch.Tensor, torch.Tensor]
    pools: bool
    cap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 ``[R, V]`` of hidden states ``[R, D]``."""
        return head_logits(hidden, self.head, self.cap)

    def matched_rows(self) -> torch.Tensor:
        """``[N_s, D]``: what is matched with the teacher's vision tokens."""
        return pool(self.hidden["vision"], self.layout) if self.pools else self.hidden["vision"]


def pool(vision: torch.Tensor, layout: tuple[ImageLayout, ...]) -> torch.Tensor:
    """Adaptive average pooling of every view's patch grid to half its sides; newline tokens are left out. ``[R, D]`` → ``[N_s, D]``."""
    pooled, start = [], 0
    for view in (view for image in layout for view in image.views):
        at = torch.tensor([place for _, _, place in view.places()], device=vision.device)
        grid = vision[start + at].reshape(*view.grid, -1).permute(2, 0, 1)
        size = (max(1, view.grid[0] // POOL), max(1, view.grid[1] // POOL))
        pooled.append(adaptive_avg_pool2d(grid, size).flatten(1).T)
        start += view.tokens()
    return torch.cat(pooled) if pooled else vision[:0]


Measured = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[StudentSide, TeacherView, slice, "torch.Tensor | None"], Measured]


@dataclass(frozen=True)
class Term:
    """One loss.

    Attributes:
        rows: row kind whose gradients are compared. needs: of the teacher.
        by_row: values per row, in chunks; else one value a sample.
        aligned: row i of the teacher is row i of the student, so their vision grids must be equal.
        matching: whose assignment of vision tokens is used: "" none, ``live``, or ``own`` (that of the source itself).
    """

    rows: str
    needs: frozenset[Need]
    loss: Loss
    by_row: bool = False
    aligned: bool = False
    matching: str = ""


def _divergence(kind: str, function: Any) -> Loss:
    def loss(student: StudentSide, view: TeacherView, rows: slice, matched: torch.Tensor | None) -> Measured:
        logits = student.logits(student.hidden[kind][rows])
        return logits, function(view.distributions[kind][rows], logits)

    return loss


def _relation(student: StudentSide, view: TeacherView, rows: slice, matched: torch.Tensor | None) -> Measured:
    assert view.relations is not None
    logits = student.logits(student.hidden["vision"])
    shared = logits[:, : view.vocabulary]
    return logits, relation_cosine(view.relations[0], shared @ shared.T)[None]


def _vsd(student: StudentSide, view: TeacherView, rows: slice, matched: torch.Tensor | None) -> Measured:
    assert matched is not None
    logits = student.logits(student.matched_rows())
    return logits, matched_reverse_kl(view.distributions["vision"], logits, matched)


def _vlad(student: StudentSide, view: TeacherView, rows: slice, matched: torch.Tensor | None) -> Measured:
    assert matched is not None and view.affinities is not None
    vision, (theirs, ours) = student.matched_rows(), student.response
    cosines = cosine_affinity(vision, student.hidden["text"][ours])
    return vision, affinity_loss(view.affinities[0], cosines, matched, theirs)[None]


VISION = "vision_logits"
RAW, RELATION, AFFINITY = "vision_raw_logits", "vision_relation", "vision_text_affinity"


def _row_terms() -> dict[str, Term]:
    divergences = {
        "forward KL": ("forward", forward_kl),
        "reverse KL": ("reverse", reverse_kl),
        "JSD": ("reverse", partial(jensen_shannon, beta=0.5)),
    }
    return {
        f"{label}, {kind}": Term(
            kind,
            frozenset({Need(f"{kind}_logits", direction)}),
            _divergence(kind, function),
            by_row=True,
            aligned=kind == "vision",
        )
        for kind in ("response", "vision")
        for label, (direction, function) in divergences.items()
    }


TERMS: dict[str, Term] = {
    **_row_terms(),
    "RDist": Term("vision", frozenset({Need(RELATION)}), _relation, aligned=True),
    "VSD": Term("vision", frozenset({Need(VISION, "reverse")}), _vsd, matching="live"),
    "VSD, own match": Term("vision", frozenset({Need(VISION, "reverse"), Need(RAW)}), _vsd, matching="own"),
    "VLAD": Term("vision", frozenset({Need(AFFINITY)}), _vlad, matching="live"),
    "VLAD, own match": Term("vision", frozenset({Need(AFFINITY), Need(RAW)}), _vlad, matching="own"),
}
"""Term → how it is measured. VSD and VLAD stand here twice: on the live teacher's assignment, which isolates the error of the target,
and on each side's own, which is what training does."""
WORDS = {
    "RDist": "relation, 1 − cosine of the Gram matrices of vision logits",
    "VSD": "reverse KL on matched vision rows",
    "VLAD": "difference of the cosines of matched vision rows and response tokens",
    "own match": "with each side's own matching, as in training, instead of the live teacher's",
}
"""Abbreviations in names of terms → what they mean."""


def legend(names: Iterable[str]) -> list[str]:
    """An empty line and one that explains the abbreviations in these names of terms; nothing where there are none."""
    shown = list(names)
    told = [f"{short}: {words}" for short, words in WORDS.items() if any(short in name for name in shown)]
    return ["", "; ".join(told) + "."] if told else []


MATCHING = "VTM"
MATCHING_NEEDS = frozenset({Need(RAW)})
