"""Norms of the terms' gradients and cosines between them, as ``--log-term-gradients`` logged them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pipelines.report.charts import short
from pipelines.report.runs import RunRecord, StageRecord

NORM, COSINE = "gradient_norm/", "gradient_cosine/"


@dataclass(frozen=True)
class TermRow:
    """One term. norm: median of its gradient's norm; first, last: of its measurements; cosines: with each term, "" with itself."""

    term: str
    norm: str
    first: str
    last: str
    cosines: list[str]


@dataclass(frozen=True)
class StageGradients:
    """run, stage: whose they are. steps: that were measured."""

    run: str
    stage: str
    steps: int
    rows: list[TermRow]


def term_gradients(runs: Sequence[RunRecord]) -> list[StageGradients]:
    """A table for each stage that has logged any."""
    return [made for run in runs for stage in run.stages if (made := _of_stage(run.name, stage))]


def _of_stage(run: str, stage: StageRecord) -> StageGradients | None:
    terms = dict.fromkeys(key.removeprefix(NORM) for point in stage.points for key in point if key.startswith(NORM))
    measured = sum(any(key.startswith(NORM) for key in point) for point in stage.points)
    rows = [_row(term, list(terms), stage) for term in terms]
    return StageGradients(run, stage.name, measured, rows) if rows else None


def _row(term: str, terms: Sequence[str], stage: StageRecord) -> TermRow:
    norms = _finite(stage, NORM + term)
    pairs = [_finite(stage, f"{COSINE}{term}:{other}") + _finite(stage, f"{COSINE}{other}:{term}") for other in terms]
    cosines = [
        f"{median(found):.2f}" if found else ("" if term == other else "–") for found, other in zip(pairs, terms)
    ]
    middle, first, last = map(short, (median(norms), norms[0], norms[-1])) if norms else ("–", "–", "–")
    return TermRow(term, middle, first, last, cosines)


def _finite(stage: StageRecord, key: str) -> list[float]:
    return [point[key] for point in stage.points if math.isfinite(point.get(key, math.nan))]
