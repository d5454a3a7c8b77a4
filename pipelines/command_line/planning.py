"""Before the job: defects of the mixture, what a capture takes, go or no-go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from pipelines.command_line.given import (
    EACH_PART,
    RUN_BY,
    data_specs,
    field_params,
    load,
    need,
    split,
    take,
    teacher_spec,
    train_settings,
)
from pipelines.command_line.options import (
    config_option,
    data_options,
    json_option,
    over_length_option,
    stored_options,
    teacher_options,
    trust_option,
)
from pipelines.command_line.output import console, naming_stdout, say
from pipelines.command_line.tour import command


@command()
@click.argument("paths", nargs=-1)
@data_options
@click.option("--teacher", help="Model folder or hub id: rows are prepared as it reads them, no weights are read.")
@click.option("--max-length", type=int, help="Longest row in tokens (default: as in [capture]).")
@over_length_option
@click.option("--show", default=0, metavar="N", type=click.IntRange(0), help="Print the last tokens of N rows a part.")
@click.option("--all", "every_row", is_flag=True, help="Name every defective row, one a line (--json always does).")
@click.option(
    "--strict",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Exit status 1 where a larger share of any part is defective, e.g. 0.01.",
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
    trust_remote_code: bool | None,
    config: str | None,
    as_json: bool,
    **each: Any,
) -> None:
    """List the defects of a mixture by kind, with row numbers. PATHS: files or globs; default: the parts of kd.toml."""
    from rich.console import Console

    from pipelines.doctor import Reading, examine, print_report
    from pipelines.progress import doctor_progress
    from pipelines.settings import override
    from teacher_cache.errors import KdcliError
    from teacher_cache.prepare import Limits

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
        raise KdcliError(f"{flags[0]} is about tokens: name the model that they are of with --teacher")
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
        worst = report.worst()
        raise KdcliError(f"--strict {strict:g}: {worst.defective_share:.2%} of part {worst.part!r} is defective")


@command("plan")
@click.option("--teacher", help="Model folder or hub id; its configuration and processor are read, no weights.")
@data_options
@click.option(
    "--rows", multiple=True, metavar="[PART=]N", help="Rows of the whole mixture, of which --data holds a few."
)
@click.option("--sample", default=512, show_default=True, type=click.IntRange(1), help="Rows to prepare.")
@click.option("--like", help="A cache of the same settings (a few hundred rows) whose bytes a row are taken.")
@click.option("--shards", type=int, help="Number of shards.")
@stored_options
@click.option("--tokens-per-second", type=float, help="Measured speed of one GPU, text and vision tokens.")
@click.option("--peak-tflops", default=989.0, show_default=True, help="Of one GPU, where no speed is given.")
@click.option("--utilisation", default=0.4, show_default=True, help="Share of the peak that is reached.")
@click.option("--gpus", default=8, show_default=True, help="GPUs of the job.")
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
    trust_remote_code: bool | None,
    config: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Before the job: rows, tokens, bytes by column, shards and hours, from a few real rows and no weights."""
    from pipelines.estimate.mixture_sample import parse_rows
    from pipelines.estimate.report import estimate_tables
    from pipelines.estimate.run import PlanRequest, estimate
    from pipelines.estimate.teacher_cost import Speed
    from pipelines.progress import bar
    from pipelines.settings import override

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
    request = PlanRequest(spec, specs, capture, params, counts, sample, like, speed)
    with bar(console(), "rows") as progress:
        task = progress.add_task("looking at rows", total=None)
        result = estimate(request, lambda done, total: progress.update(task, completed=done, total=total))
    say(json.dumps(result.to_json(), ensure_ascii=False) if as_json else estimate_tables(result))


@command()
@click.option("--teacher", help="Model folder or hub id.")
@click.option("--student", help="Model folder or hub id that will be trained.")
@data_options
@click.option("--methods", help="Methods to try, comma-separated (default: llava-kd,kd; of a text-only teacher kd).")
@click.option("--rows", default=256, show_default=True, help="Rows of the mixture; a third is held out to judge.")
@click.option("--out", default="preflight", show_default=True, help="Folder or URL; the rows' cache is OUT/cache.")
@click.option("--store", help="compact, standard (whose fineness is chosen) or exact.")
@click.option("--fields", help="Single fields instead of a profile, comma-separated.")
@click.option("--shards", type=int, help="Number of shards of the real job.")
@click.option("--max-length", type=int, help="Longest row in tokens.")
@click.option("--max-angle", default=1.0, show_default=True, help="Degrees between whole gradients, cache and live.")
@click.option("--max-kl", default=0.005, show_default=True, help="Nats between stored and live distributions, mean.")
@click.option("--max-bytes", type=int, help="Most bytes of all fields together, a sample.")
@click.option("--write/--no-write", default=True, show_default=True, help="Write what was chosen into kd.toml.")
@click.option("--gpus", default=8, show_default=True, help="GPUs of the real job.")
@click.option("--dtype", help="auto, float32, bfloat16, float16.")
@teacher_options
@config_option
@json_option
def preflight(
    teacher: str | None,
    student: str | None,
    data: tuple[str, ...],
    methods: str | None,
    store: str | None,
    fields: str | None,
    shards: int | None,
    max_length: int | None,
    write: bool,
    trust_remote_code: bool | None,
    config: str | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Go or no-go before the job: a few hundred rows through the cache and the actual student. Exit status 1: no-go."""
    from dataclasses import replace

    from pipelines.preflight import report
    from pipelines.preflight.request import PreflightRequest, default_methods
    from pipelines.preflight.run import preflight as run
    from pipelines.run_records import finite
    from pipelines.settings import FILE, override
    from teacher_cache.places import place_of

    settings = load(config)
    specs = data_specs(data, **take(asked, EACH_PART)) or settings.data
    spec = teacher_spec(teacher, settings.teacher, trust_remote_code, **take(asked, RUN_BY))
    need({"--teacher": spec, "--data": specs})
    capture = override(
        settings.capture, store=store, fields=split(fields), shards=shards, max_length=max_length, workers=1
    )
    settings = replace(settings, capture=capture, train=train_settings(settings.train, student, trust_remote_code))
    kd_file = Path(config or FILE) if write else None
    place_of(str(asked["out"]), "--out")  # before the teacher is looked at
    tried = default_methods(spec) if methods is None else split(methods) or ()
    request = PreflightRequest(spec, specs, settings, tried, kd_file=kd_file, **asked)
    with report.preflight_progress(console()) as progress:
        result = run(request, progress)
    say(json.dumps(finite(result), ensure_ascii=False) if as_json else report.report(result))
    if not result["go"]:
        sys.exit(1)
