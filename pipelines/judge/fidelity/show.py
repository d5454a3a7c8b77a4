"""The comparison for a person: Markdown tables, a progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.judge.fidelity.plot import write_plot
from pipelines.judge.fidelity.terms import legend
from pipelines.terminal.progress import bar
from pipelines.terminal.tables import table
from pipelines.train.run_records import write_record
from teacher_cache.whole_file import write_whole

DIRECTIONS = ("forward", "reverse")


def report(result: Mapping[str, Any]) -> str:
    """Every table of ``run.fidelity``, one after the other."""
    sections = [heading(result), term_table(result), unserved_lines(result), matching_table(result)]
    sections += [distribution_table(result), sweep_table(result), notes(result)]
    return "\n\n".join(one for one in sections if one)


def heading(result: Mapping[str, Any]) -> str:
    rows = result["rows"]
    return (
        f"{result['cache']} against its live teacher {result['teacher']} ({result['dtype']}, {result['device']}): "
        f"{result['samples']} samples of part {', '.join(result['parts'])}, {rows['response']} response and {rows['vision']} "
        f"vision rows, seed {result['seed']}.\nStudent {result['student']}, stage {result['stage']}, gradients of "
        f"{result['trained_parameters']:,} parameters."
    )


def other_runs(result: Mapping[str, Any]) -> list[str]:
    """Live runs besides the one that everything is compared with."""
    first: Mapping[str, Any] = next(iter(result["terms"].values()), {})
    return [name for name in first if name not in ("fields", "rows", "live", "cache")]


def term_table(result: Mapping[str, Any]) -> str:
    """Cache against live, term by term, and the live teacher against itself run otherwise; abbreviations below."""
    if not result["terms"]:
        return ""
    floor = other_runs(result)
    header = ["term", "served by", "loss", "error", "row angle", "p95", "row norm", "p95", "gradient angle", "norm"]
    header += [f"{name}: {what}" for name in floor for what in ("error", "angle")]
    body = []
    for name, one in result["terms"].items():
        cache = one["cache"]
        cells = [name, " + ".join(short(field) for field in one["fields"]), number(one["live"]["loss"])]
        cells += [percent(cache["loss_error"]), *(degrees(cache["row_angle"][key]) for key in ("median", "p95"))]
        cells += [ratio(cache["row_norm_ratio"][key]) for key in ("median", "p95")]
        cells += [degrees(cache["gradient_angle"]), ratio(cache["gradient_norm_ratio"])]
        for run in floor:
            cells += [percent(one[run]["loss_error"]), degrees(one[run]["gradient_angle"])]
        body.append(cells)
    return "Losses and gradients, the cache against the live teacher:\n\n" + "\n".join(
        [table(header, body), *legend(result["terms"])]
    )


def unserved_lines(result: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: not served: {why}" for name, why in result["unserved"].items())


def matching_table(result: Mapping[str, Any]) -> str:
    """VTM: the assignment from each side, priced with the live teacher's logits."""
    if not result["matching"]:
        return ""
    body = [
        [name, percent(one["equal_pairs"], sign=False), *(f"{one['cost_ratio'][key]:.6f}" for key in ("mean", "max"))]
        for name, one in result["matching"].items()
    ]
    header = ["VTM", "equal pairs", "cost / live optimum", "worst sample"]
    return "Matching of vision tokens (VTM). Near-ties decide the pairs: compare costs:\n\n" + table(header, body)


def distribution_table(result: Mapping[str, Any]) -> str:
    """Each way in which the cache tells distributions: bytes, divergence, gradients."""
    found = result["distributions"]
    if not found:
        return ""
    header = ["stored", "bytes a row", "with tar", *FIGURES]
    body = [
        [name, f"{one['payload_per_row']:.1f}", f"{one['tar_per_row']:.1f}", *figures(one)]
        for name, one in found.items()
    ]
    entropies = {one["kind"]: one["entropy"] for one in found.values()}
    text = ", ".join(f"{kind} {number(value)}" for kind, value in entropies.items())
    return f"Distributions (mean entropy in nats: {text}); KL(p‖p̂) in nats:\n\n" + table(header, body)


def sweep_table(result: Mapping[str, Any]) -> str:
    """The frontier, by row kind."""
    sections = []
    for kind in dict.fromkeys(one["kind"] for one in result["sweep"]):
        chosen = [one for one in result["sweep"] if one["kind"] == kind]
        fine = [one for one in chosen if "error" not in one]
        body = [[one["label"], f"{one['bytes_per_row']:.1f}", *figures(one)] for one in fine]
        text = f"Frontier, {kind} rows:\n\n" + table(["stored", "bytes a row", *FIGURES], body)
        sections.append("\n".join([text, *(f"{one['label']}: {one['error']}" for one in chosen if "error" in one)]))
    return "\n\n".join(sections)


FIGURES = ["KL", "p95", *(f"{d}: {what}" for d in DIRECTIONS for what in ("head gradient", "row angle", "p95"))]


def figures(one: Mapping[str, Any]) -> list[str]:
    """Cells of ``FIGURES`` from one result of ``measure.Comparison.summary``."""
    kl = one.get("kl")
    cells = [number(kl[key]) if kl else "–" for key in ("mean", "p95")]
    for direction in DIRECTIONS:
        found = one.get(direction)
        if found is None:
            cells += ["–"] * 3
        else:
            cells += [
                degrees(found.get("head_angle")),
                *(degrees(found["row_angle"][key]) for key in ("median", "p95")),
            ]
    return cells


def notes(result: Mapping[str, Any]) -> str:
    return "\n".join(f"note: {one}" for one in result["notes"])


def short(field: str) -> str:
    return field.removeprefix("response_").removeprefix("vision_")


def number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2g}" if abs(value) < 0.1 else f"{value:.4g}"


def percent(value: float | None, sign: bool = True) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if sign and abs(value) < 5e-6:
        return "<0.001 %"
    return f"{100 * value:+.3f} %" if sign else f"{100 * value:.1f} %"


def degrees(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else "<0.01°" if value < 0.005 else f"{value:.2f}°"


def ratio(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"


def write_files(result: Mapping[str, Any], plot: str | None, out: str | None) -> None:
    """The plot, and the tables as a Markdown page that shows it; everything as JSON where ``out`` ends so (`kdcli report` draws that)."""
    if plot:
        write_plot(result, Path(plot))
    if out and out.endswith(".json"):
        write_record(Path(out), result)
    elif out:
        picture = f"\n\n![bytes a row against gradient angle]({plot})" if plot else ""
        write_whole(Path(out), f"# Fidelity\n\n{report(result)}{picture}\n")


@contextmanager
def fidelity_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """``progress(event, done, total)`` for ``run.fidelity``."""
    with bar(console, "steps") as progress:
        task = progress.add_task("reading", total=None)

        def show(event: str, done: int, total: int) -> None:
            progress.update(task, description=event, completed=done, total=total)

        yield show
