"""A preflight for a person: the verdict first, then the tables behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from pipelines.judge.fidelity.terms import legend
from pipelines.judge.preflight.ladder import MOST_ROWS
from pipelines.judge.preflight.steps import label_of, step_lines
from pipelines.terminal.progress import bar
from pipelines.terminal.tables import cut_words, human_bytes, table

Body = Mapping[str, Any]


TRIED = "tried.md"
"""Beside the cache: the tables of everything that was measured."""


def report(body: Body) -> str:
    """What ``run.preflight`` found; the tables of what was tried are ``tried_page``."""
    sections = [verdict(body)]
    if "rows" in body:
        sections += [
            chosen_lines(body),
            rows_line(body),
            label_lines(body),
            method_tables(body),
            cost_lines(body),
            canary_line(body),
        ]
    sections.append(kd_lines(body))
    return "\n\n".join(one for one in sections if one)


def label_lines(body: Body) -> str:
    """What the teacher's agreement with the labels lets one expect, a line a part."""
    if error := body["labels"].get("error"):
        return f"Labels were not checked: {error}"
    advice = [f"- {one}" for one in body["labels"]["advice"]]
    return "\n".join([f"Labels (the first answers to look at are in {body['out'].rstrip('/')}/{TRIED}):", *advice])


def chosen_lines(body: Body) -> str:
    """What was chosen, and one step up and down from it; where everything else stands."""
    if not body["frontier"]:
        return ""
    samples = sum(part["usable_rows"] for part in body["estimate"].get("parts", []))
    lines = step_lines(body["frontier"], place_of_choice(body), body["estimate"].get("bytes"), samples)
    return "\n".join([*lines, f"Everything that was measured: {body['out'].rstrip('/')}/{TRIED}"])


def place_of_choice(body: Body) -> int:
    """The chosen step's number."""
    labels = {one["kind"]: one["label"] for one in body["choices"]}
    return next(number for number, one in enumerate(body["frontier"]) if one["labels"] == labels)


def tried_page(body: Body) -> str:
    """The frontier, and every candidate of each row kind."""
    header = ["stored", "B a token", "B a sample", "KL, nats", "whole gradient"]
    lines = []
    for step in body["frontier"]:
        sizes = [f"{step['bytes_per_token']:.1f}", f"{step['bytes_per_sample']:,.0f}"]
        about = "" if step["measured"] else "about "
        angle = "–" if step["angle"] is None else f"{about}{degrees(step['angle'])}"
        lines.append([label_of(step["labels"]), *sizes, number(step["kl"]), angle])
    rows = body["rows"]
    text = (
        f"Fitted on {fitted_words(rows)}, measured on {rows['judged']} other samples ({MOST_ROWS:,} token rows of a kind at most), "
        f"whole gradients on {rows['compared']} of them."
    )
    sections = ["# What a preflight measured", text, table(header, lines)]
    return "\n\n".join([*sections, *map(ladder_table, body["choices"])]) + "\n"


def fitted_words(rows: Body) -> str:
    one = rows["fitted"]
    return f"{one['samples']:,} rows ({one['response']:,} response and {one['vision']:,} vision tokens)"


def number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2g}"


def verdict(body: Body) -> str:
    said = ["GO"] if body["go"] else ["NO-GO", *(f"- {reason}" for reason in body["reasons"])]
    return "\n".join([*said, *(f"- WARNING: {warning}" for warning in body["warnings"])])


def rows_line(body: Body) -> str:
    rows = body["rows"]
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(rows["skipped"].items()))
    return (
        f"Rows: {rows['sampled']} sampled, {rows['written']} captured, {sum(rows['skipped'].values())} skipped"
        + (f" ({skipped})" if skipped else "")
        + cut_words(rows["cut_rows"], rows["cut_images"])
        + f". Fitted on {fitted_words(rows)}; judged on {rows['judged']} others, whole gradients on {rows['compared']} of them. "
        f"Cache: {body['cache']}"
    )


def ladder_table(choice: Body) -> str:
    """Every candidate of one row kind, the cheapest first; angles of the student's whole gradient where they were asked for."""
    lines = []
    for one in choice["ladder"]:
        chosen = one["label"] == choice["label"]
        label = f"**{one['label']}**" if chosen else one["label"]
        if one["error"]:
            continue
        whole = max((angle for angle in one["angles"].values() if not math.isnan(angle)), default=math.nan)
        sizes = [f"{one['bytes_per_row']:.1f}", number(one["kl"])]
        heads = [degrees(one["head_angles"].get(direction, math.nan)) for direction in ("forward", "reverse")]
        lines.append([label, *sizes, *heads, degrees(whole)])
    header = ["stored", "B a row", "KL, nats", "head: forward", "head: reverse", "whole gradient"]
    why = choice["reasons"][0] if choice["reasons"] else "within the budget"
    failed = dict.fromkeys(one["error"] for one in choice["ladder"] if one["error"])
    left_out = "".join(f"\n\nleft out: {error}" for error in failed)
    return f"{choice['kind']} rows, chosen: {choice['label']} ({why})\n\n{table(header, lines)}{left_out}"


def method_tables(body: Body) -> str:
    lines = []
    for one in body["methods"]:
        for name, term in one["terms"].items():
            lines.append(
                [
                    f"{one['method']}: {name}",
                    " + ".join(term["fields"]),
                    percent(term["loss_error"]),
                    degrees(term["gradient_angle"]),
                    percent(term["floor_error"]),
                    degrees(term["floor_angle"]),
                ]
            )
    header = ["method: term", "served by", "loss error", "gradient angle", "floor: loss", "floor: angle"]
    text = ["Cache against the live teacher, on the actual student (floor: the live teacher in other batches):", ""]
    text += [table(header, lines)] if lines else ["(no term could be compared)"]
    text += [*legend(term for one in body["methods"] for term in one["terms"]), ""]
    for one in body["methods"]:
        text += [f"- {one['method']}: {step_words(one)}"] + [f"  note: {note}" for note in one["notes"]]
    return "\n".join(text)


def step_words(one: Body) -> str:
    step = one["step"]
    if not step:
        return "cannot be trained: " + "; ".join(one["reasons"]) if one["reasons"] else "no step was taken"
    return (
        f"{step['seconds']:.3g} s for {step['samples']} samples ({step['tokens']:,} tokens) in stage {step['stage']}, "
        f"{step['optimizer_step_seconds']:.3g} s an optimizer step; peak memory {human_bytes(step['peak_bytes'])} of {step['of']}"
    )


def cost_lines(body: Body) -> str:
    sizes = ", ".join(f"{name} {human_bytes(size)}" for name, size in body["bytes_per_sample"].items())
    lines = [
        f"Measured bytes a sample: {sizes or 'no field'} (together {human_bytes(sum(body['bytes_per_sample'].values()))})"
    ]
    one = body["estimate"]
    if "error" in one:
        return "\n".join([*lines, one["error"]])
    hours, rows = one["hours"], sum(part["rows"] for part in one["parts"])
    lines.append(
        f"Whole job: {rows:,} rows, {one['tokens']:,} tokens, {human_bytes(one['bytes'])} in {one['shards']} shards; "
        f"{hours['gpu_hours']:,.2f} GPU-hours, {hours['wall_hours']:,.2f} h on {hours['gpus']} GPUs like this device ({hours['basis']})"
    )
    return "\n".join([*lines, *(f"- Note: {note}." for note in one["notes"])])


def canary_line(body: Body) -> str:
    one = body["canaries"]
    if one["floor"] is None:
        return ""
    return (
        f"Canaries: hidden states of two live runs differ by {one['floor']:.2g} (relative RMS, {one['dtype']}), logits by at most "
        f"{one['floor_logit']:.2g}; `kdcli cache-teacher` checks them before it starts"
    )


def kd_lines(body: Body) -> str:
    """What was written to kd.toml, or what to paste."""
    written = body.get("kd_toml")
    if not written:
        return ""
    if written["written"]:
        return (
            f"{written['path']} changed:\n\n{written['diff']}"
            if written["diff"]
            else f"{written['path']} has these settings already"
        )
    return f"{written['why']}:\n\n{written['block']}"


def degrees(angle: float) -> str:
    return "–" if angle is None or math.isnan(angle) else f"{angle:.2g}°"


def percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:+.2g} %"


@contextmanager
def preflight_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """``progress(event, done, total)`` for ``run.preflight``."""
    with bar(console, "parts") as progress:
        task = progress.add_task("starting", total=None)
        yield lambda event, done, total: progress.update(task, description=event, completed=done, total=total)
