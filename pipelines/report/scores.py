"""Results of models over question families: mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report.runs import RunRecord
from pipelines.terminal.tables import uncounted_lines
from pipelines.train.run_records import misfit_of_result
from teacher_cache.errors import KdcliError

Results = dict[str, list[Mapping[str, Any]]]


@dataclass(frozen=True)
class ScoreCell:
    """Exact match in percent: mean over seeds, sample standard deviation where there are several, questions of one seed."""

    mean: float
    std: float | None
    questions: int
    best: bool = False

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.std:.1f}" if self.std is not None else "")


@dataclass(frozen=True)
class ScoreTable:
    """
    Attributes:
        names: the models. summary: the mean of families, model by model.
        rows: (family, questions, a cell a model or None); questions: one number a model where they differ.
        uncounted: a line or more on rows of the file that are not among the questions.
    """

    names: list[str]
    seeds: list[int]
    summary: list[ScoreCell]
    rows: list[tuple[str, str, list[ScoreCell | None]]]
    uncounted: list[str]


def collect_results(runs: Sequence[RunRecord], scores: Mapping[str, Any] | None) -> Results:
    """Name → results, one a seed: what the caller gives, else what the run folders hold; the teacher first."""
    given: Results = {name: _as_list(name, one) for name, one in (scores or {}).items()}
    found: Results = {}
    for run in runs:
        for name, one in run.scores.items():
            # Every run of an ablation may carry the same teacher result: that is one result, not several seeds.
            new = [result for result in _as_list(f"{run.folder}: {name}", one) if result not in found.get(name, [])]
            found.setdefault(name, []).extend(new)
    merged = {**found, **given}
    return {name: merged[name] for name in sorted(merged, key=lambda name: name != "teacher")}


def _as_list(name: str, value: Any) -> list[Mapping[str, Any]]:
    results = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for one in results:
        if wrong := misfit_of_result(one):
            raise KdcliError(
                f"scores of {name}: expected the result of `kdcli eval --json` (families, family_mean, exact_match): {wrong}"
            )
    return results


def score_rows(results: Results) -> ScoreTable | None:
    """The table of the page; None where there is nothing to show."""
    if not results:
        return None
    names = list(results)
    families = sorted({family for runs in results.values() for one in runs for family in one["families"]})
    found = [(family, [_family(results[name], family) for name in names]) for family in families]
    summary = [_cell([(one["family_mean"], one.get("n", 0)) for one in results[name]]) for name in names]
    everything = [_cell([(one["exact_match"], one.get("n", 0)) for one in results[name]]) for name in names]
    found += [("mean of families", list(summary)), ("all questions", list(everything))]
    rows = [(family, _questions(cells), _mark(cells, names)) for family, cells in found]
    uncounted = uncounted_lines({name: results[name][0] for name in names})
    return ScoreTable(names, [len(results[name]) for name in names], summary, rows, uncounted)


def _questions(cells: Sequence[ScoreCell | None]) -> str:
    counts = [str(cell.questions) if cell else "–" for cell in cells]
    return counts[0] if len(set(counts)) == 1 else " / ".join(counts)


def _family(results: Sequence[Mapping[str, Any]], family: str) -> ScoreCell | None:
    found = [one["families"][family] for one in results if family in one["families"]]
    return _cell([(one["exact_match"], one.get("n", 0)) for one in found]) if found else None


def _cell(values: Sequence[tuple[float, int]]) -> ScoreCell:
    percents = [100 * value for value, _ in values]
    std = statistics.stdev(percents) if len(percents) > 1 else None
    return ScoreCell(statistics.mean(percents), std, values[0][1])


def _mark(cells: list[ScoreCell | None], names: Sequence[str]) -> list[ScoreCell | None]:
    """Mark the best student; the teacher is the ceiling, not a competitor. One student alone is not "best"."""
    students = [cell.mean for cell, name in zip(cells, names) if cell and name != "teacher"]
    if len(students) < 2:
        return cells
    top = round(max(students), 1)
    return [
        ScoreCell(cell.mean, cell.std, cell.questions, best=name != "teacher" and round(cell.mean, 1) == top)
        if cell
        else None
        for cell, name in zip(cells, names)
    ]
