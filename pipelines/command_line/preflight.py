"""``kdcli preflight``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from pipelines.command_line.given import (
    BUDGET,
    EACH_PART,
    RUN_BY,
    data_specs,
    load,
    need,
    split,
    take,
    teacher_spec,
    train_settings,
)
from pipelines.command_line.options import (
    budget_options,
    config_option,
    data_options,
    json_option,
    teacher_options,
)
from pipelines.command_line.output import console, say
from pipelines.command_line.tour import command


@command()
@click.option("--teacher", help="Model folder or hub id.")
@click.option("--student", help="Model folder or hub id of the student to train.")
@data_options
@click.option("--methods", help="Methods to try, comma-separated (default: llava-kd,kd; for a text-only teacher kd).")
@click.option(
    "--rows", default=256, show_default=True, help="Rows of the mixture to use; a third is held out for the comparison."
)
@click.option(
    "--out", default="preflight", show_default=True, help="Output folder or URL; the cache of the rows is OUT/cache."
)
@click.option("--store", help="compact, standard (preflight chooses its precision) or exact.")
@click.option("--fields", help="Fields to store instead of a profile, comma-separated.")
@click.option("--shards", type=int, help="Number of shards of the full job.")
@click.option("--max-length", type=int, help="Maximum length of a row in tokens.")
@budget_options
@click.option(
    "--max-kl",
    type=float,
    help="Budget: mean KL of stored and live distributions in nats (default: 0.005, and 1°).",
)
@click.option("--write/--no-write", default=True, show_default=True, help="Write the chosen parameters into kd.toml.")
@click.option("--gpus", default=8, show_default=True, help="Number of GPUs of the full job.")
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
    """Decide go or no-go before the job: compare cache and live teacher on a few hundred rows and the actual student.
    Exit status 1: no-go."""
    from dataclasses import replace

    from pipelines.judge.preflight import report
    from pipelines.judge.preflight.budget import Budget
    from pipelines.judge.preflight.request import PreflightRequest, default_methods
    from pipelines.judge.preflight.run import preflight as run
    from pipelines.settings import FILE, override
    from pipelines.train.run_records import finite
    from teacher_cache.shards.places import place_of

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
    budget = Budget(**take(asked, BUDGET))
    request = PreflightRequest(spec, specs, settings, tried, kd_file=kd_file, budget=budget, **asked)
    with report.preflight_progress(console()) as progress:
        result = run(request, progress)
    say(json.dumps(finite(result), ensure_ascii=False) if as_json else report.report(result))
    if not result["go"]:
        sys.exit(1)
