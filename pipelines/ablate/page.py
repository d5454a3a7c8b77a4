"""``OUT/results.html``: the tables of an ablation as pictures too; one self-contained page in the house's style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.ablate import plot
from pipelines.ablate.cells import Cell
from pipelines.ablate.results import LEGEND, Section, interval, sections, written
from pipelines.report.charts import run_styles, stage_charts
from pipelines.report.page import duration, header, settings_table, template
from pipelines.report.runs import RunRecord, read_runs
from teacher_cache.errors import KdcliError
from teacher_cache.whole_file import write_whole


def write_page(
    cells: Sequence[Cell], baseline: str | None, failed: Sequence[Mapping[str, str]], title: str, out: Path
) -> Path:
    """Write the page; works with whatever cells are there."""
    shown = first_runs(cells)
    page = template("ablation.html").render(
        title=title,
        header=header(shown, None) if shown else [],
        legend=LEGEND,
        baseline=baseline,
        sections=[section_body(one, baseline) for one in sections(cells)],
        cells=[cell_row(cell) for cell in cells],
        failed=failed,
        styles=run_styles(shown),
        stages=stage_charts(shown),
        settings=[(run, settings_table(run)) for run in shown],
        width=plot.WIDTH,
        line=plot.LINE,
    )
    write_whole(out, page)
    return out


def first_runs(cells: Sequence[Cell]) -> list[RunRecord]:
    """The first seed of every row that has logged something: more curves would hide each other."""
    first: dict[str, Cell] = {}
    for cell in cells:
        if cell.row not in first and (cell.folder / "run.json").is_file():
            first[cell.row] = cell
    runs = []
    for row, cell in first.items():
        with suppress(KdcliError):  # a damaged log has no curve; the numbers of the tables are its card's
            runs += [replace(run, name=row, group=row) for run in read_runs([cell.folder])]
    return runs


def section_body(section: Section, baseline: str | None) -> dict[str, Any]:
    """One evaluation: plots, and tables of text."""
    body: dict[str, Any] = {
        "label": section.label,
        "metrics": section.metrics,
        "plots": plot.value_plots(section),
        "rows": [
            (row, [written(section.spread(row, metric), metric) for metric in section.metrics], _count(section, row))
            for row in section.rows
        ],
        "differences": None,
        "uncounted": section.uncounted,
    }
    if baseline:
        body["difference_plots"] = plot.difference_plots(section, baseline)
        body["differences"] = [
            (row, [_difference(section, row, baseline, metric) for metric in section.metrics])
            for row in section.rows
            if row != baseline
        ]
    return body


def _difference(section: Section, row: str, baseline: str, metric: str) -> str:
    one = section.difference(row, baseline, metric)
    return written(one, metric, signed=True) + interval(one, metric)


def _count(section: Section, row: str) -> int:
    return max((len(seeds) for seeds in section.values[row].values()), default=0)


def cell_row(cell: Cell) -> dict[str, Any]:
    """One line of the table of students."""
    card = cell.card()
    seconds = card.get("seconds", {})
    return {
        "name": cell.name,
        "state": cell.state(),
        "method": cell.method,
        "stages": ", ".join(stage.shared for stage in cell.stages),
        "train": duration(seconds["train"]) if seconds else "–",
        "ask": duration(seconds["evaluate"]) if seconds else "–",
    }
