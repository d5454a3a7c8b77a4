"""Answers → figures: over all questions, over families (each counts the same), and by family."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.judge.evaluation.metrics import DEFAULT, measure, metric_module
from pipelines.judge.evaluation.metrics.exact_match import score as exact

BINS = 15
"""Of confidence, as most papers take."""


@dataclass(frozen=True)
class Answer:
    """One scored question.

    Attributes:
        family: the row's ``family`` column, or its part.
        expected: the last assistant turn, whose ``nats`` are measured.
        nats: negative log-likelihood of all ``tokens`` of the expected answer; 0 tokens where training could not render the row.
        references: texts that metrics compare with; empty: the expected answer alone.
        tops: (probability of the likeliest token, that token is the answer's) at each of the ``tokens``; empty where nats are no number.
    """

    family: str
    question: str
    expected: str
    given: str
    nats: float = 0.0
    tokens: int = 0
    references: tuple[str, ...] = ()
    tops: tuple[tuple[float, bool], ...] = ()

    @property
    def held_against(self) -> tuple[str, ...]:
        return self.references or (self.expected,)

    @property
    def correct(self) -> bool:
        return exact(self.given, self.held_against) == 1


def score(answers: Sequence[Answer], metrics: Sequence[str] = DEFAULT) -> dict[str, Any]:
    """Exact match over all rows, over families, and by family; ``nll`` and further metrics in the same three ways.

    Returns:
        ``{"n", "exact_match", "family_mean", "nll", "nll_family_mean", "families": {name: {"n", "exact_match", "tokens", "nll"}}}``;
        ``nll`` is None where no answer token was scored; ``"ece"`` is ``calibration_error`` of all answer tokens.
        A further metric ``m`` adds ``"m"`` and ``"m_family_mean"``, and ``"m"`` in each family that has questions it
        applies to (``pope``: columns of its own); ``"references"`` then counts questions by their number.
    """
    more = [name for name in dict.fromkeys(metrics) if name not in DEFAULT]
    by_family: dict[str, list[Answer]] = defaultdict(list)
    for one in answers:
        by_family[one.family].append(one)
    families = {name: _tally(members, more) for name, members in sorted(by_family.items())}
    every = _tally(answers, more)
    result = {
        "n": every.pop("n"),
        "exact_match": every.pop("exact_match"),
        "family_mean": _family_mean(families, "exact_match") or 0.0,
        "nll": every.pop("nll"),
        "nll_family_mean": _family_mean(families, "nll"),
        "ece": calibration_error([top for one in answers for top in one.tops]),
    }
    every.pop("tokens")
    for column, value in every.items():
        result |= {column: value, f"{column}_family_mean": _family_mean(families, column)}
    if more:
        result["references"] = dict(sorted(Counter(len(one.held_against) for one in answers).items()))
    return {**result, "families": families}


def calibration_error(tops: Sequence[tuple[float, bool]]) -> float | None:
    """Expected calibration error, 0 to 1, of (confidence, is right) pairs; None where there are none.

    Confidences fall into ``BINS`` bins of equal width; the mean of each bin's |share of right ones − mean confidence|, weighted by how many
    fall into it (Guo et al., arXiv 1706.04599, equation 3).
    """
    bins: dict[int, list[float]] = defaultdict(list)
    for sure, right in tops:
        bins[min(int(sure * BINS), BINS - 1)].append(right - sure)
    return sum(abs(sum(one)) for one in bins.values()) / len(tops) if tops else None


def answer_row(one: Answer, metrics: Sequence[str]) -> dict[str, Any]:
    """One line of an answers file: the answer, and its score by each metric (None: the metric does not apply to it)."""
    scores = {name: metric_module(name).score(one.given, one.held_against) for name in metrics}
    body = asdict(one)
    del body["tops"]
    return {**body, "references": list(one.held_against), "scores": scores}


def _tally(answers: Sequence[Answer], more: Sequence[str]) -> dict[str, Any]:
    tokens = sum(one.tokens for one in answers)
    found: dict[str, Any] = {
        "n": len(answers),
        "exact_match": sum(one.correct for one in answers) / max(1, len(answers)),
        "tokens": tokens,
        "nll": sum(one.nats for one in answers) / tokens if tokens else None,
    }
    pairs = [(one.given, one.held_against) for one in answers]
    for name in more:
        found |= measure(name, pairs)
    return found


def _family_mean(families: dict[str, dict[str, Any]], column: str) -> float | None:
    """Over the families that have the column."""
    values = [one[column] for one in families.values() if one.get(column) is not None]
    return sum(values) / len(values) if values else None
