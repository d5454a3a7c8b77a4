"""Cells → numbers: mean and sample standard deviation over seeds, and differences to a baseline, seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import t as student_t

from pipelines.ablate.cells import Cell
from pipelines.terminal.tables import further_metrics, table, uncounted_lines

MEAN, NLL = "mean of families, %", "nll, nats a token"
ECE = "calibration error"


@dataclass(frozen=True)
class Spread:
    """Over seeds: mean, sample standard deviation (None for one seed), how many."""

    mean: float
    std: float | None
    n: int

    @property
    def half_width(self) -> float | None:
        """Of the 95 % interval of the mean (Student's t); None for one seed."""
        if self.std is None:
            return None
        return float(student_t.ppf(0.975, self.n - 1)) * self.std / math.sqrt(self.n)


@dataclass(frozen=True)
class Section:
    """One evaluation: a line a row, a column a metric.

    Attributes:
        rows: in the order of the grid. metrics: column names. values: row → metric → seed → value, finished cells alone.
        uncounted: a line or more on held-out rows that could not be asked.
    """

    label: str
    rows: tuple[str, ...]
    metrics: tuple[str, ...]
    values: Mapping[str, Mapping[str, Mapping[int, float]]]
    uncounted: tuple[str, ...] = ()

    def spread(self, row: str, metric: str) -> Spread | None:
        return spread(list(self.values[row].get(metric, {}).values()))

    def difference(self, row: str, baseline: str, metric: str) -> Spread | None:
        """Row less baseline over the seeds that both have."""
        ours, theirs = self.values[row].get(metric, {}), self.values[baseline].get(metric, {})
        return spread([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def sections(cells: Sequence[Cell], losses: bool = False) -> list[Section]:
    """A section an evaluation, in the order of the grid; ``losses`` adds the last stage's final loss terms."""
    rows = tuple(dict.fromkeys(cell.row for cell in cells))
    found: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
    whole: dict[str, dict[str, Mapping[str, Any]]] = {}
    for cell in cells:
        card = cell.card()
        last = list(card.get("losses", {}).values())[-1:] if losses else []
        metrics = {name: value for terms in last for name, value in terms.items()}
        for label, scores in current_scores(cell, card).items():
            values = found.setdefault(label, {row: {} for row in rows})
            whole.setdefault(label, {}).update({cell.row: scores} if scores else {})
            for name, value in {**(score_metrics(scores) if scores else {}), **metrics}.items():
                if value is not None:  # a loss that was no number
                    values[cell.row].setdefault(name, {})[cell.seed] = value
    return [
        Section(
            label,
            rows,
            tuple(sorted({m for row in rows for m in values[row]}, key=_order)),
            values,
            tuple(uncounted_lines(whole[label])),
        )
        for label, values in found.items()
    ]


def current_scores(cell: Cell, card: Mapping[str, Any]) -> dict[str, Mapping[str, Any] | None]:
    """Evaluation → scores of the card, None where they are still to come or of another file or options; without any: one, ``""``."""
    results = card.get("results", {})
    wanted = {one.label: one.key for one in cell.evaluations} or {"": ""}
    return {
        label: results[label]["scores"] if results.get(label, {}).get("key") == key else None
        for label, key in wanted.items()
    }


def score_metrics(scores: Mapping[str, Any]) -> dict[str, float]:
    """``pipelines.judge.evaluation.run.score`` → the columns of a table: percent, and nats a token where they were measured."""
    found = {MEAN: 100 * scores["family_mean"]}
    if scores.get("nll_family_mean") is not None:
        found[NLL] = scores["nll_family_mean"]
    if scores.get("ece") is not None:
        found[ECE] = scores["ece"]
    families = scores["families"]
    found |= {f"{name}, %": 100 * one["exact_match"] for name, one in families.items()}
    further = [column for column in further_metrics([scores]) if scores[f"{column}_family_mean"] is not None]
    found |= {f"{column}, mean of families, %": 100 * scores[f"{column}_family_mean"] for column in further}
    return found | {f"nll {name}": one["nll"] for name, one in families.items() if one.get("nll") is not None}


def _order(metric: str) -> tuple[float, str]:
    """The means first, then families, then their nll, then losses."""
    first = {MEAN: 0, NLL: 1, ECE: 1.5}.get(metric)
    if first is not None:
        return first, metric
    return (4 if metric.startswith("loss") else 3 if metric.startswith("nll ") else 2), metric


def results_table(section: Section, metrics: Sequence[str]) -> str:
    """Rows × metrics, mean ± sample standard deviation over seeds."""
    body = []
    for row in section.rows:
        counts = {one.n for metric in metrics if (one := section.spread(row, metric))}
        body.append([row, *(written(section.spread(row, metric), metric) for metric in metrics), _counts(counts)])
    return table([section.label or "student", *metrics, "seeds"], body)


def paired_table(section: Section, baseline: str, metrics: Sequence[str]) -> str:
    """Rows less the baseline: mean of per-seed differences ± sample standard deviation, and the 95 % interval of the mean."""
    body = []
    for row in section.rows:
        if row == baseline:
            continue
        found = {metric: section.difference(row, baseline, metric) for metric in metrics}
        cells = [written(one, metric, signed=True) + interval(one, metric) for metric, one in found.items()]
        body.append([row, *cells, _counts({one.n for one in found.values() if one})])
    return table([f"less {baseline}", *metrics, "pairs"], body)


def _counts(counts: set[int]) -> str:
    return "0" if not counts else "–".join(str(one) for one in dict.fromkeys((min(counts), max(counts))))


def written(one: Spread | None, metric: str, signed: bool = False) -> str:
    if one is None:
        return "–"
    return _number(one.mean, metric, signed) + (f" ± {_number(one.std, metric)}" if one.std is not None else "")


def interval(one: Spread | None, metric: str) -> str:
    if one is None or one.half_width is None:
        return ""
    ends = (one.mean - one.half_width, one.mean + one.half_width)
    return f" [{', '.join(_number(end, metric, signed=True) for end in ends)}]"


def _number(value: float, metric: str, signed: bool = False) -> str:
    """Percent with one digit, nats with three."""
    return f"{value:{'+' if signed else ''}.{1 if metric.endswith('%') else 3}f}"


def short_metrics(section: Section) -> list[str]:
    """The columns of the table on the terminal: the means, each family's percent where they are few, losses where they were asked for."""
    families = [one for one in section.metrics if _order(one)[0] == 2]
    shown = [one for one in section.metrics if _order(one)[0] in (0, 1, 1.5, 4)]
    return sorted(shown + (families if len(families) <= 8 else []), key=_order)


def overview(found: Sequence[Section]) -> list[str]:
    """Where students were asked in several ways: one table a mean, rows × evaluations."""
    tables = []
    for metric in (MEAN, NLL) if len(found) > 1 else ():
        labels = [one.label for one in found]
        body = [[row, *(written(one.spread(row, metric), metric) for one in found)] for row in found[0].rows]
        tables.append(table([metric, *labels], body))
    return tables


def markdown(cells: Sequence[Cell], baseline: str | None, losses: bool) -> str:
    """Every table, with what its numbers mean."""
    found = sections(cells, losses)
    lines = overview(found)
    for section in found:
        metrics = short_metrics(section)
        lines.append(results_table(section, metrics))
        lines += section.uncounted
        if baseline and metrics:
            lines.append(paired_table(section, baseline, metrics))
    done = sum(cell.state() == "done" for cell in cells)
    lines.append(f"{done} of {len(cells)} students finished. {LEGEND}")
    return "\n\n".join(lines)


LEGEND = (
    "± is the sample standard deviation over seeds, [ ] the 95 % interval of a mean of per-seed differences (Student's t). "
    "Exact match in percent, every family counting the same; nll: nats a token of the expected answers, over the tokens of a family, "
    "then the mean of families."
)


def as_json(cells: Sequence[Cell], baseline: str | None) -> dict[str, Any]:
    """Everything: each cell's card, and the numbers of the tables."""
    listed = [{**cell.card(), "name": cell.name, "state": cell.state(), "folder": str(cell.folder)} for cell in cells]
    tables = []
    for section in sections(cells, losses=True):
        rows = {
            row: {metric: _plain(section.spread(row, metric)) for metric in section.metrics} for row in section.rows
        }
        body: dict[str, Any] = {"evaluation": section.label, "rows": rows}
        if baseline:
            body["less"] = baseline
            body["differences"] = {
                row: {metric: _plain(section.difference(row, baseline, metric)) for metric in section.metrics}
                for row in section.rows
                if row != baseline
            }
        tables.append(body)
    return {"cells": listed, "tables": tables}


def _plain(one: Spread | None) -> dict[str, Any] | None:
    return {**asdict(one), "half_width_95": one.half_width} if one else None
