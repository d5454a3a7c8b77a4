"""``kdcli ablate``: plan every cell, run what is missing, write the tables."""

from __future__ import annotations

import fnmatch
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.ablate import results
from pipelines.ablate.cell import ASKED, CHOOSE, WHAT
from pipelines.ablate.cells import LOG, Cell, make_cells
from pipelines.ablate.grid import AblationGrid, load_grid
from pipelines.ablate.page import write_page
from pipelines.ablate.runner import Slot, make_slots, prune_models, run_cells
from pipelines.terminal.tables import table
from pipelines.train.output_lock import NAME, alone
from pipelines.train.run_records import write_record
from teacher_cache.errors import KdcliError
from teacher_cache.whole_file import write_whole

LOG_TAIL = 400
"""Bytes at the end of a log among which its last line is."""


@dataclass(frozen=True)
class AblateRequest:
    """What ``kdcli ablate`` was asked.

    Attributes:
        only: a glob of ``row/seed-N`` or of the row. limit: at most so many cells this time. losses: final loss terms as columns too.
    """

    grid: Path
    out: Path
    devices: str | None = None
    workers: int | None = None
    only: str | None = None
    limit: int | None = None
    retry_failed: bool = False
    losses: bool = False


def ablate(request: AblateRequest, console: Any) -> dict[str, Any]:
    """Run the grid; ``{"cells", "tables", "failed": [{"name", "error", "log"}], "markdown"}``. Tables are written whatever happens."""
    grid = load_grid(request.grid)
    slots = make_slots(request.devices, request.workers)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if (request.out / NAME).is_file():
        with alone(request.out, WHAT, CHOOSE, say):
            pass  # who comes second is told at once, before hundreds of cells are planned
    cells = make_cells(grid, request.out)
    with alone(request.out, WHAT, CHOOSE, say):
        return run_grid(request, grid, cells, slots, console, say)


def run_grid(
    request: AblateRequest,
    grid: AblationGrid,
    cells: Sequence[Cell],
    slots: Sequence[Slot],
    console: Any,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """``ablate`` in a folder that nobody else writes to."""
    chosen = choose(cells, request)
    seeds = list(dict.fromkeys(cell.seed for cell in chosen))
    chosen.sort(
        key=lambda cell: seeds.index(cell.seed)
    )  # every row of one seed first: an early table compares all rows
    waiting = [cell for cell in chosen if cell.state() != "done" and (request.retry_failed or cell.state() != "failed")]
    errors: dict[str, str] = {}
    for cell in chosen:
        if damage := cell.damage():
            say(f"note: {damage}")
    try:
        errors = run_shown(waiting[: request.limit], slots, grid, cells, console)
    finally:
        written = write_results(cells, grid, request, errors)
    return written


def choose(cells: Sequence[Cell], request: AblateRequest) -> list[Cell]:
    if not request.only:
        return list(cells)
    chosen = [cell for cell in cells if any(fnmatch.fnmatchcase(name, request.only) for name in (cell.name, cell.row))]
    if not chosen:
        rows = ", ".join(dict.fromkeys(cell.row for cell in cells))
        raise KdcliError(f"--only {request.only!r} matches no student; students are ROW/seed-N, the rows are {rows}")
    return chosen


def run_shown(
    waiting: Sequence[Cell], slots: Sequence[Slot], grid: AblationGrid, cells: Sequence[Cell], console: Any
) -> dict[str, str]:
    """Run cells under a bar, a line for each that ends; the errors of those that did not end well, by name."""
    from pipelines.terminal.progress import bar

    if not waiting:
        return {}
    ended: list[Cell] = []
    errors: dict[str, str] = {}
    with bar(console, "students") as progress:
        task = progress.add_task("ablate", total=len(waiting))
        began = time.perf_counter()

        def on_end(cell: Cell, error: str) -> None:
            ended.append(cell)
            errors.update({cell.name: error} if error else {})
            progress.update(task, advance=1)
            progress.console.print(
                ended_line(cell, error, f"{len(ended)}/{len(waiting)}"), highlight=False, markup=False
            )
            if not grid.keep_models and not error:
                prune_models(cells)

        def say(text: str) -> None:
            progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

        def on_poll(running: list[Cell]) -> None:
            progress.update(task, description=", ".join(map(running_line, running)) or "ablate")

        run_cells(waiting, slots, on_end, on_poll, say)
    console.print(f"{len(ended)} students in {time.perf_counter() - began:.0f} s", highlight=False)
    return errors


def running_line(cell: Cell) -> str:
    """The student's name with what its log says last, as ``sft/seed-0 02-SFT step 120/200``."""
    try:
        with (cell.folder / LOG).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL))
            said = log.read().decode(errors="replace").splitlines()
    except OSError:
        return cell.name
    told = said[-1] if said else ""
    step = re.match(r"\S+ step \d+/\d+", told)
    return f"{cell.name} {step[0] if step else ASKED if told.startswith(ASKED) else ''}".rstrip()


def ended_line(cell: Cell, error: str, count: str) -> str:
    if error:
        return f"{count} {cell.name} FAILED: {error} (log: {cell.folder / LOG})"
    card = cell.card()
    told = [f"{label}: {100 * one['scores']['family_mean']:.1f} %" for label, one in card["results"].items()]
    told.append("trained {train:.0f} s, asked {evaluate:.0f} s".format(**card["seconds"]))
    return f"{count} {cell.name} {'; '.join(told)}"


def failures(cells: Sequence[Cell], errors: Mapping[str, str]) -> list[dict[str, str]]:
    """Failed cells with the last line of their error and their log; those too that only this time did not end (``errors``)."""
    failed = [
        {
            "name": cell.name,
            **{key: str(value) for key, value in cell.failure().items()},
        }
        for cell in cells
        if cell.state() == "failed"
    ]
    known = {one["name"] for one in failed}
    stopped = [cell for cell in cells if cell.name in errors.keys() - known]
    return failed + [{"name": cell.name, "error": errors[cell.name], "log": str(cell.folder / LOG)} for cell in stopped]


def write_results(
    cells: Sequence[Cell], grid: AblationGrid, request: AblateRequest, errors: Mapping[str, str]
) -> dict[str, Any]:
    """``results.md``, ``results.json`` and ``results.html`` in the output folder."""
    text = results.markdown(cells, grid.baseline, request.losses)
    body = {"grid": str(grid.path), **results.as_json(cells, grid.baseline), "failed": failures(cells, errors)}
    write_whole(request.out / "results.md", f"# {grid.path.stem}\n\n{text}\n")
    write_record(request.out / "results.json", body)
    write_page(cells, grid.baseline, body["failed"], grid.path.stem, request.out / "results.html")
    return {**body, "markdown": text}


def dry_run(request: AblateRequest) -> tuple[list[dict[str, Any]], str]:
    """What would run: (a dictionary a cell, the table of them). Every check of a real run is made."""
    cells = choose(make_cells(load_grid(request.grid), request.out), request)
    users = Counter(stage.shared for cell in cells for stage in cell.stages)
    listed = [
        {
            "name": cell.name,
            "state": cell.state(),
            "method": cell.method,
            "stages": [stage.shared for stage in cell.stages],
            "evaluations": [one.label for one in cell.evaluations],
            "folder": str(cell.folder),
        }
        for cell in cells
    ]
    body = []
    for cell in cells:
        names = " ".join(f"{one.shared}{'*' if users[one.shared] > 1 else ''}" for one in cell.stages)
        body.append([cell.name, cell.state(), cell.method, names])
    stages = {stage for cell in cells for stage in cell.stage_folders()}
    trained = sum((stage / "done.json").is_file() for stage in stages)
    counts = Counter(one["state"] for one in listed)
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    text = table(["student", "state", "method", "stages"], body)
    return (
        listed,
        f"{text}\n{len(cells)} students: {told}. {len(stages)} stages, {trained} trained; * shared by several students.",
    )
