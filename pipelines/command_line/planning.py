"""Before the job: defects of the mixture, what a capture takes, go or no-go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pipelines.command_line.given import (
    EACH_PART,
    data_specs,
    field_params,
    load,
    need,
    split,
    take,
    teacher_spec,
)
from pipelines.command_line.options import (
    A_FILE,
    budget_options,
    config_option,
    data_options,
    json_option,
    over_length_option,
    stored_options,
    trust_option,
)
from pipelines.command_line.output import console, naming_stdout, say
from pipelines.command_line.tour import command


@command()
@click.argument("paths", nargs=-1)
@data_options
@click.option(
    "--teacher",
    help="Model folder or hub id whose template, tokenizer and processor prepare the rows.",
)
@click.option("--max-length", type=int, help="Maximum length of a row in tokens (default: as in [capture]).")
@over_length_option
@click.option(
    "--show", default=0, metavar="N", type=click.IntRange(0), help="Print the last tokens of N rows per part."
)
@click.option("--all", "every_row", is_flag=True, help="List every defective row, one per line (--json always does).")
@click.option(
    "--strict",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Exit with status 1 if a larger share of any part is defective, e.g. 0.01.",
)
@click.option(
    "--cache", "cache_url", help="Check the labels of a cache instead: list those that its teacher contradicts."
)
@click.option("--parts", help="With --cache: parts to check, comma-separated; default: all.")
@click.option(
    "--worst", type=click.IntRange(0), help="With --cache: print the N most contradicted answers (default 20)."
)
@click.option(
    "--weights",
    type=A_FILE,
    help="With --cache: write X.jsonl, row weights for `--select reg=file:X.jsonl:right`.",
)
@trust_option
@config_option
@json_option
def doctor(
    paths: tuple[str, ...],
    data: tuple[str, ...],
    teacher: str | None,
    max_length: int | None,
    over_length: str | None,
    show: int,
    every_row: bool,
    strict: float | None,
    cache_url: str | None,
    parts: str | None,
    worst: int | None,
    weights: str | None,
    trust_remote_code: bool | None,
    config: str | None,
    as_json: bool,
    **each: Any,
) -> None:
    """List the defects of a mixture by kind, with row numbers; with --cache, the answers that are probably wrong.
    PATHS: files or globs; default: the parts of kd.toml."""
    of_rows = {"PATHS": paths, "--data": data, "--teacher": teacher, "--max-length": max_length}
    of_rows |= {"--over-length": over_length, "--show": show, "--all": every_row, "--strict": strict is not None}
    of_labels = {"--parts": parts, "--worst": worst is not None, "--weights": weights}
    refuse_both(cache_url, of_rows, of_labels)
    if cache_url:
        examine_labels(cache_url, split(parts), 20 if worst is None else worst, weights, as_json)
        return
    from rich.console import Console

    from pipelines.judge.doctor import Reading, examine, print_report
    from pipelines.settings import override
    from pipelines.terminal.progress import doctor_progress
    from teacher_cache.errors import KdcliError
    from teacher_cache.preparing.prepare import Limits

    settings = load(config)
    given = data_specs(paths + data, **each)
    specs = given or settings.data
    if not specs:
        raise KdcliError(
            "no data: name files (`kdcli doctor rows.json --image-root images`), or run `kdcli init` for a kd.toml"
        )
    spec = teacher_spec(teacher, None if given else settings.teacher, trust_remote_code)
    of_tokens = {"--show": show, "--max-length": max_length, "--over-length": over_length}
    if spec is None and (flags := [flag for flag, value in of_tokens.items() if value]):
        raise KdcliError(f"{flags[0]} needs a tokenizer: name its model with --teacher")
    capture = override(settings.capture, max_length=max_length, over_length=over_length)
    limits = Limits(capture.max_length, capture.over_length)
    reading = Reading(spec, limits, show) if spec else None
    with doctor_progress(console()) as progress:
        report = examine(specs, progress, every_defect=every_row or as_json, reading=reading)
    if as_json:
        say(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        with naming_stdout():
            print_report(report, Console(), every_row)
    if strict is not None and report.worst().defective_share > strict:
        part = report.worst()
        raise KdcliError(f"--strict {strict:g}: {part.defective_share:.2%} of part {part.part!r} is defective")


def refuse_both(cache_url: str | None, of_rows: dict[str, Any], of_labels: dict[str, Any]) -> None:
    """KdcliError where flags about a mixture stand beside --cache, or flags about a cache's labels without it."""
    from teacher_cache.errors import KdcliError

    if cache_url and (given := [name for name, value in of_rows.items() if value]):
        raise KdcliError(
            f"--cache checks the labels of a cache, {given[0]} the files of a mixture: give only one of them"
        )
    if not cache_url and (given := [name for name, value in of_labels.items() if value]):
        raise KdcliError(f"{given[0]} applies to the labels of a cache: name the cache with --cache")


def examine_labels(url: str, parts: Any, worst: int, weights: str | None, as_json: bool) -> None:
    """``doctor --cache``."""
    from pipelines.judge.labels.show import report, to_json
    from pipelines.judge.labels.survey import survey
    from pipelines.judge.labels.weights import WeightsFile
    from pipelines.terminal.progress import bar
    from pipelines.train.run_records import finite
    from teacher_cache.reading.cache import TeacherCache

    file = WeightsFile(Path(weights)) if weights else None
    with bar(console(), "rows") as progress:
        task = progress.add_task("labels", total=None)
        made = survey(
            TeacherCache(url),
            worst,
            parts,
            each=file.add if file else None,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if file:
        file.finish(made)
    say(json.dumps(finite(to_json(made)), ensure_ascii=False) if as_json else report(made))


@command("plan")
@click.option("--teacher", help="Model folder or hub id; only its configuration and processor are read.")
@data_options
@click.option(
    "--rows", multiple=True, metavar="[PART=]N", help="Number of rows of the whole mixture, if --data holds only a few."
)
@click.option("--sample", default=512, show_default=True, type=click.IntRange(1), help="Rows to prepare.")
@click.option("--like", help="Cache with the same settings (a few hundred rows) to take bytes per row from.")
@click.option("--shards", type=int, help="Number of shards.")
@stored_options
@budget_options
@click.option("--tokens-per-second", type=float, help="Measured speed of one GPU in text and vision tokens.")
@click.option(
    "--peak-tflops", default=989.0, show_default=True, help="Peak of one GPU, used without --tokens-per-second."
)
@click.option("--utilisation", default=0.4, show_default=True, help="Share of the peak that the teacher reaches.")
@click.option("--gpus", default=8, show_default=True, help="Number of GPUs of the job.")
@trust_option
@config_option
@json_option
def plan(
    teacher: str | None,
    data: tuple[str, ...],
    rows: tuple[str, ...],
    sample: int,
    like: str | None,
    fields: str | None,
    k: int | None,
    codec: str | None,
    parts_without_fields: str | None,
    tokens_per_second: float | None,
    peak_tflops: float,
    utilisation: float,
    gpus: int,
    fidelity: float | None,
    bytes_per_token: float | None,
    trust_remote_code: bool | None,
    config: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Estimate rows, tokens, bytes by column, shards and hours of a capture, from a few real rows and no weights."""
    from pipelines.judge.plan.mixture_sample import parse_rows
    from pipelines.judge.plan.report import estimate_tables
    from pipelines.judge.plan.run import PlanRequest, estimate
    from pipelines.judge.plan.teacher_cost import Speed
    from pipelines.judge.preflight.budget import Budget
    from pipelines.settings import override
    from pipelines.terminal.progress import bar

    settings = load(config)
    specs = data_specs(data, **take(flags, EACH_PART)) or settings.data
    spec = teacher_spec(teacher, settings.teacher, trust_remote_code)
    need({"--teacher": spec, "--data": specs})
    capture = override(
        settings.capture, fields=split(fields), parts_without_fields=split(parts_without_fields), **flags
    )
    counts = parse_rows(rows, [one.part for one in specs])
    speed = Speed(tokens_per_second, peak_tflops, utilisation, gpus)
    params = field_params(settings, capture, k, codec)
    budget = Budget(fidelity, bytes_per_token)
    request = PlanRequest(spec, specs, capture, params, counts, sample, like, speed, budget)
    with bar(console(), "rows") as progress:
        task = progress.add_task("looking at rows", total=None)
        result = estimate(request, lambda done, total: progress.update(task, completed=done, total=total))
    say(json.dumps(result.to_json(), ensure_ascii=False) if as_json else estimate_tables(result))
