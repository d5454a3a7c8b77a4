"""The batch job: the teacher over every row once, here or as a Slurm array."""

from __future__ import annotations

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
)
from pipelines.command_line.options import (
    config_option,
    data_options,
    json_option,
    stored_options,
    teacher_options,
)
from pipelines.command_line.output import console, say, say_summary, warn
from pipelines.command_line.tour import command


@command("cache-teacher")
@click.option("--teacher", help="Model folder or hub id; null:FOLDER generates fake signals (docs/scaling.md).")
@data_options
@click.option("--out", help="Output cache: a folder or an fsspec URL.")
@click.option("--shards", type=int, help="Number of shards, fixed for the life of the cache.")
@stored_options
@click.option("--executor", help="Scheduler of the shards: local, ray or slurm (docs/scaling.md).")
@click.option("--workers", type=int, help="Worker processes or Ray actors; default: one per GPU.")
@click.option("--encode-workers", type=int, help="Encoding threads per worker; default: from the number of cores.")
@click.option("--ray-address", help="Address of a Ray cluster, e.g. auto; default: RAY_ADDRESS, else this machine.")
@click.option("--slurm-tasks", type=int, help="Number of tasks in the Slurm array.")
@click.option("--slurm-options", help="Options for sbatch, e.g. '--partition=gpu --gres=gpu:1'.")
@click.option("--dry-run", is_flag=True, help="With --executor slurm: print the scripts, submit nothing.")
@click.option("--part-of-shards", metavar="I/N", help="Make only shards whose number modulo N is I.")
@click.option("--prepare-only", is_flag=True, help="Plan, calibrate and describe only; make no shards.")
@click.option(
    "--allow-skips",
    type=float,
    metavar="SHARE",
    help="Maximum share of a part's rows that may be skipped (default 0.05).",
)
@click.option("--retry-skipped", is_flag=True, help="Add skipped rows whose cause of failure is gone.")
@click.option("--batch-tokens", type=int, help="Padded tokens per teacher batch.")
@click.option("--calibration-rows", type=int, help="Rows that the teacher reads before the job, to fit codecs.")
@click.option("--calibration", help="Cache of `kdcli preflight` to take the calibration from; '' fits a new one.")
@click.option("--staging-gb", type=float, help="Maximum temporary disk (TMPDIR) per worker in GB; for object stores.")
@click.option("--seed", type=int, help="Seed of the row order.")
@click.option("--dtype", help="auto, float32, bfloat16, float16.")
@teacher_options
@config_option
@json_option
def cache_teacher(
    teacher: str | None,
    data: tuple[str, ...],
    out: str | None,
    fields: str | None,
    k: int | None,
    codec: str | None,
    parts_without_fields: str | None,
    slurm_options: str | None,
    dry_run: bool,
    part_of_shards: str | None,
    prepare_only: bool,
    retry_skipped: bool,
    trust_remote_code: bool | None,
    config: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Run the teacher over every row once and write the cache. Run the command again to continue."""
    import shlex

    from pipelines.capture import cache_teacher as pipeline
    from pipelines.settings import override
    from pipelines.terminal.progress import capture_progress

    settings = load(config)
    specs = data_specs(data, **take(flags, EACH_PART)) or settings.data
    spec = teacher_spec(teacher, settings.teacher, trust_remote_code, **take(flags, RUN_BY))
    target = out or settings.cache
    need({"--teacher": spec, "--data": specs, "--out": target})
    capture = override(
        settings.capture,
        fields=split(fields),
        parts_without_fields=split(parts_without_fields),
        slurm_options=tuple(shlex.split(slurm_options)) if slurm_options is not None else None,
        **flags,
    )
    if capture.executor == "slurm":
        submit_to_slurm(capture, dry_run)
        return
    if dry_run:
        raise click.UsageError("--dry-run prints Slurm's scripts: add --executor slurm")
    params = field_params(settings, capture, k, codec)
    request = pipeline.CaptureRequest(
        spec,
        specs,
        target,
        capture,
        params,
        part_of_shards=part_of(part_of_shards),
        prepare_only=prepare_only,
        retry_skipped=retry_skipped,
    )
    with capture_progress(console()) as progress:
        summary = pipeline.capture(request, progress, warn)
    shards = f"{summary['shards']} shard{'s' * (summary['shards'] != 1)}"
    line = f"{summary['rows']} rows in {shards} at {target}; plan {summary['plan_hash'][:12]}"
    say_summary(summary, as_json, line)


def part_of(text: str | None) -> tuple[int, int] | None:
    """``3/64`` → (3, 64)."""
    from teacher_cache.errors import KdcliError

    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise KdcliError(f"--part-of-shards: expected I/N, e.g. 3/64, got {text!r}")
    return int(number), int(count)


SCHEDULING = {"executor", "slurm_tasks", "slurm_options", "dry_run", "ray_address", "part_of_shards", "prepare_only"}


def submit_to_slurm(capture: Any, dry_run: bool) -> None:
    """The command as it was given, without what says how it is scheduled, as the task of an array."""
    from pipelines.capture.executors.slurm import SlurmJob

    # -P: not the cli.py of the folder in which the tasks run.
    program = [sys.argv[0]] if Path(sys.argv[0]).name == "kdcli" else [sys.executable, "-P", "-m", "cli"]
    words = [*program, "cache-teacher", *given_again(click.get_current_context(), SCHEDULING)]
    folder = Path("slurm")
    job = SlurmJob(words, capture.slurm_tasks, capture.slurm_options, folder, Path.cwd())
    if dry_run:
        say(job.plan())
        return
    first, array = job.submit()
    say(
        f"submitted: {first} prepares, then array {array} with {job.tasks} tasks; scripts and logs in {folder}/\n"
        "`kdcli cache status` shows how far it is"
    )


def given_again(context: click.Context, leave_out: set[str]) -> list[str]:
    """The flags of a command as they were given, in the order of its options."""
    words = []
    for option in context.command.params:
        name = str(option.name)
        if name in leave_out or context.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        for one in value if isinstance(value, tuple) else (value,):
            words += [option.opts[-1]] if one is True else [option.opts[-1], str(one)]
    return words
