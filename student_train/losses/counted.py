"""Which rows of a term count, and how much. ``reduce.py`` takes its means by that, and nothing else does.

A term's mean is Σ w·value / Σ w over all rows of the optimizer step: of all micro-batches, of all processes. w is 1 where nothing is
selected (``selection.py``). So neither gradient accumulation nor the number of processes changes it, and a common factor of all w neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from student_train.losses.terms import HiddenTerm, RowTerm, SampleTerm, StudentRows, Term, Terms
from student_train.teacher_view import TeacherView

OF_TOKENS = ("response", "answer")
"""Kinds of rows that stand one by one for response tokens."""


@dataclass(frozen=True)
class TermWeights:
    """How much the rows of one micro-batch count for one term.

    Attributes:
        tokens: float32 ``[R_response]``, for terms on response rows.
        samples: float32 ``[B]``, for terms on vision rows and on whole samples.
    """

    tokens: torch.Tensor
    samples: torch.Tensor

    def rows(self, kind: str, counts: Sequence[int]) -> torch.Tensor:
        """Of every row of a kind, ``[R]``."""
        if kind in OF_TOKENS:
            return self.tokens
        return self.samples.repeat_interleave(torch.tensor(list(counts), device=self.samples.device))

    def means(self, kind: str, counts: Sequence[int], skip_first: int) -> list[float]:
        """Of each sample, the mean over its rows that count; 0 where it has none."""
        if kind not in OF_TOKENS:
            return self.samples.tolist()
        split = [one[skip_first:].double() for one in self.tokens.split(list(counts))]
        return [float(one.mean()) if len(one) else 0.0 for one in split]


Weights = Mapping[str, TermWeights]
"""By term; one that is not there weighs every row 1."""


def count_rows(counts: Mapping[str, Sequence[int]], terms: Terms, weights: Weights | None = None) -> dict[str, float]:
    """Denominator contributed by a micro-batch to every term; summed over the optimizer step and all processes.

    Args:
        counts: by row kind, rows of each sample that can count (a matched method's ``vision`` without those that nothing matches).
    """
    return {name: _count(counts, term, (weights or {}).get(name)) for name, term in terms.items()}


def _count(counts: Mapping[str, Sequence[int]], term: Term, weights: TermWeights | None) -> float:
    if isinstance(term, SampleTerm):
        skipped = [[max(0, n - term.skip_first * (kind == "vision")) for n in counts[kind]] for kind in term.rows]
        there = [float(all(sample)) for sample in zip(*skipped)]
        return sum(n * w for n, w in zip(there, weights.samples.tolist())) if weights else sum(there)
    skip_first = term.skip_first if isinstance(term, RowTerm) else 0
    rows = [max(0, count - skip_first) for count in counts[term.rows]]
    if isinstance(term, RowTerm) and term.sum_rows:
        rows = [int(count > 0) for count in rows]
    if not weights:
        return float(sum(rows))
    return sum(n * w for n, w in zip(rows, weights.means(term.rows, counts[term.rows], skip_first)))


@dataclass(frozen=True)
class Counted:
    """mask: bool ``[R]``, the rows that count; None: all. weight: float32 ``[R]``; None: 1."""

    mask: torch.Tensor | None
    weight: torch.Tensor | None

    def values(self, values: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """A term's values ``[C]`` at these rows, each as it counts; a row that does not count may be anything, also no number."""
        kept = values if self.mask is None else torch.where(self.mask[rows], values, 0.0)
        return kept if self.weight is None else kept * self.weight[rows]


def counted(
    term: RowTerm | HiddenTerm, student: StudentRows, teacher: TeacherView, weights: TermWeights | None
) -> Counted:
    """How the rows of a micro-batch count for a term."""
    kind, device = term.rows, student.head.device
    counts = student.counts[kind]
    masks, weight = [], None
    if skip_first := term.skip_first if isinstance(term, RowTerm) else 0:
        masks.append(torch.cat([torch.arange(count, device=device) >= skip_first for count in counts]))
    if kind == "vision" and teacher.matched is not None:
        masks.append(torch.cat(list(teacher.matched)))
    if weights:
        weight = weights.rows(kind, counts)
        masks.append(weight > 0)
    return Counted(torch.stack(masks).all(0) if masks else None, weight)
