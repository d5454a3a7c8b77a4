"""Every term from every source against the live teacher: values, gradients of rows, gradients of the student's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from pipelines.judge.fidelity.measure import RowTally, relative_error, row_chunks, whole_angle
from pipelines.judge.fidelity.sources import OutputSource
from pipelines.judge.fidelity.student import KINDS, Gradient, Student
from pipelines.judge.fidelity.terms import MATCHING, StudentSide, Term
from student_train.losses.matching import manhattan_cost, match

LIVE = "live"
MOST_BYTES = 1 << 29
"""Parameter gradients kept at once, one a term and source: with a large student the terms take their turns."""
Matches = Mapping[str, Sequence[torch.Tensor]]


def match_all(
    student: Student, sources: Mapping[str, OutputSource]
) -> tuple[dict[str, list[torch.Tensor]], dict[str, Any]]:
    """Each source's assignment of its vision tokens to the student's, and what it costs on the live teacher's own logits.

    Returns:
        source → per sample ``[N_s]``; source → ``{"equal_pairs": share, "cost_ratio": {"mean", "max"}}``, cost of its assignment
        divided by the live optimum.
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name in sources}
    equal: dict[str, list[torch.Tensor]] = {name: [] for name in sources}
    ratios: dict[str, list[float]] = {name: [] for name in sources}
    for number, hidden in enumerate(student.matched_rows()):
        dense = torch.zeros(0)
        for name, source in sources.items():
            teacher = source.view(MATCHING, number).raw_vision
            assert teacher is not None, "its matching needs it"
            cost = manhattan_cost(teacher, hidden, student.head, cap=student.cap)
            dense = cost if name == LIVE else dense
            matched = match(cost)
            found[name].append(matched)
            if len(matched):
                best = found[LIVE][number]
                columns = torch.arange(len(matched), device=cost.device)
                equal[name].append((matched == best).float().cpu())
                ratios[name].append(float(dense[matched, columns].sum() / dense[best, columns].sum()))
    summary = {
        name: {
            "equal_pairs": float(torch.cat(equal[name]).mean()),
            "cost_ratio": {"mean": sum(ratios[name]) / len(ratios[name]), "max": max(ratios[name])},
        }
        for name in sources
        if name != LIVE and ratios[name]
    }
    return found, summary


def compare(
    terms: Mapping[str, Term],
    student: Student,
    sources: Mapping[str, OutputSource],
    matches: Matches,
    progress: Callable[[int, int], None] = lambda more, total: None,
) -> dict[str, dict[str, Any]]:
    """Term → source → ``{"loss", "loss_error", "row_angle", "row_norm_ratio", "gradient_angle", "gradient_norm_ratio"}``.

    sources: ``live`` first, which all others are compared with. A source that does not serve a term is left out of it.
    """
    found: dict[str, dict[str, Any]] = {}
    names = list(terms)
    group = max(1, int(MOST_BYTES // (len(sources) * 4 * sum(one.numel() for one in student.parameters))))
    steps = -(-len(names) // group) * len(student.batches)
    for start in range(0, len(names), group):
        chosen = {name: terms[name] for name in names[start : start + group]}
        found |= _compare_group(chosen, student, sources, matches, lambda: progress(1, steps))
    return found


def _compare_group(
    terms: Mapping[str, Term],
    student: Student,
    sources: Mapping[str, OutputSource],
    matches: Matches,
    progress: Callable[[], None],
) -> dict[str, dict[str, Any]]:
    works = {
        name: TermWork(name, term, student, {s: one for s, one in sources.items() if name in one.signals}, matches)
        for name, term in terms.items()
    }
    for numbers in student.batches:
        states, split = student.forward(numbers)
        for work in works.values():
            work.add(states, split, numbers)
        progress()
    return {name: work.summary() for name, work in works.items()}


class TermWork:
    """One term over the batches: a tally and a parameter gradient for every source."""

    def __init__(self, name: str, term: Term, student: Student, sources: Mapping[str, OutputSource], matches: Matches):
        self.name, self.term, self.student, self.sources, self.matches = name, term, student, sources, matches
        self.tallies = {source: RowTally() for source in sources}
        self.gradients: dict[str, Gradient] = {source: student.no_gradient() for source in sources}

    def add(
        self, states: dict[str, torch.Tensor], split: dict[str, list[torch.Tensor]], numbers: Sequence[int]
    ) -> None:
        """One batch: every sample's loss from every source, then one backward a source through the student."""
        at_states = {
            source: {kind: [torch.zeros_like(one) for one in split[kind]] for kind in KINDS} for source in self.sources
        }
        for place, number in enumerate(numbers):
            side = self.student.side(number, {kind: split[kind][place] for kind in KINDS})
            if len(side.hidden[self.term.rows]):
                mine = {source: {kind: at[kind][place] for kind in KINDS} for source, at in at_states.items()}
                self._add_sample(number, side, mine)
        for source, at in at_states.items():
            self.student.pull(states, {kind: torch.cat(at[kind]) for kind in KINDS}, self.gradients[source])

    def _add_sample(self, number: int, side: StudentSide, at_states: dict[str, dict[str, torch.Tensor]]) -> None:
        views = {source: one.view(self.name, number) for source, one in self.sources.items()}
        for rows in self._chunks(side):
            reference = torch.zeros(0)
            for source, view in views.items():
                point, values = self.term.loss(side, view, rows, self._matched(source, number))
                asked = {"point": point, **side.hidden, **({"head": side.head} if side.head.requires_grad else {})}
                found = torch.autograd.grad(values.sum(), list(asked.values()), allow_unused=True)
                gradients = dict(zip(asked, found))
                at_point = gradients.pop("point")
                at_point = torch.zeros_like(point) if at_point is None else at_point
                reference = at_point if source == LIVE else reference
                self.tallies[source].add(values.detach(), reference, at_point)
                for kind, gradient in gradients.items():
                    if gradient is None:
                        continue
                    if kind == "head":
                        self.student.pull_head(gradient, self.gradients[source])
                    else:
                        at_states[source][kind] += gradient

    def _chunks(self, side: StudentSide) -> Iterator[slice]:
        count = len(side.hidden[self.term.rows])
        return row_chunks(count, side.head) if self.term.by_row else iter([slice(0, count)])

    def _matched(self, source: str, number: int) -> torch.Tensor | None:
        if not self.term.matching:
            return None
        return self.matches[LIVE if self.term.matching == "live" else source][number]

    def summary(self) -> dict[str, Any]:
        live, gradient = self.tallies[LIVE], self.gradients[LIVE]
        found: dict[str, Any] = {"rows": self.term.rows, LIVE: {"loss": live.mean, "count": live.count}}
        for source, tally in self.tallies.items():
            if source == LIVE:
                continue
            angle, ratio = whole_angle(gradient, self.gradients[source])
            found[source] = {
                **tally.summary(),
                "loss_error": relative_error(tally.mean, live.mean),
                "gradient_angle": angle,
                "gradient_norm_ratio": ratio,
            }
        return found
