"""Commands of ``kdcli cache`` that change a cache or make another one of it."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from pipelines.command_line.given import (
    EACH_PART,
    RUN_BY,
    data_specs,
    field_params,
    load,
    named_cache,
    need,
    open_cache,
    parse_knobs,
    split,
    take,
    teacher_spec,
)
from pipelines.command_line.options import (
    A_FILE,
    cache_named,
    column_named,
    config_option,
    data_options,
    json_option,
    teacher_options,
)
from pipelines.command_line.output import console, say, say_summary
from pipelines.command_line.tour import command


@command()
@cache_named
@click.option("--teacher", help="Model folder or hub id of the cache's teacher.")
@data_options
@click.option("--dry-run", is_flag=True, help="List the damage and the source of each repair; change nothing.")
@click.option("--replace", is_flag=True, help="Accept repaired shards whose bytes differ from the original.")
@click.option("--shards", type=int, help="As in the capture; for a lost manifest.")
@click.option("--seed", type=int, help="As in the capture; for a lost manifest.")
@click.option("--max-length", type=int, help="As in the capture; for a lost manifest.")
@click.option("--over-length", type=click.Choice(["skip", "cut"]), help="As in the capture; for a lost manifest.")
@click.option("--store", help="As in the capture; for a lost field.json.")
@click.option("--fields", help="As in the capture; for a lost field.json.")
@click.option("--k", "k", type=int, help="As in the capture; for a lost field.json.")
@click.option("--codec", help="As in the capture; for a lost field.json.")
@click.option("--set", "knobs", multiple=True, metavar="FIELD.NAME=VALUE", help="Parameter for a lost field.json.")
@click.option("--calibration-rows", type=int, help="As in the capture; for lost calibrations.")
@click.option("--calibration", help="Cache to take lost calibrations from: the preflight's, or a copy.")
@click.option("--workers", type=int, help="Worker processes; default: one per GPU.")
@click.option("--encode-workers", type=int, help="Encoding threads per worker; default: from the number of cores.")
@click.option("--batch-tokens", type=int, help="Padded tokens per teacher batch, as in the capture.")
@click.option("--dtype", help="float32, bfloat16, float16; default: that of the readable fields.")
@teacher_options
@config_option
@json_option
def repair(
    url: str | None,
    teacher: str | None,
    data: tuple[str, ...],
    dry_run: bool,
    replace: bool,
    fields: str | None,
    k: int | None,
    codec: str | None,
    knobs: tuple[str, ...],
    trust_remote_code: bool | None,
    config: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Make damaged shards and files again, and nothing else. Give the flags of the capture. Refused during a capture.

    Exit status 1 if something stays damaged, with the reason.
    """
    from pipelines.edit import repair as pipeline
    from pipelines.settings import override
    from pipelines.terminal.progress import capture_progress
    from pipelines.terminal.tables import repair_lines

    settings = load(config)
    specs = data_specs(data, **take(flags, EACH_PART)) or settings.data
    spec = teacher_spec(teacher, settings.teacher, trust_remote_code, **take(flags, RUN_BY))
    capture = override(settings.capture, fields=split(fields), **flags)
    params = {**settings.fields, **field_params(settings, capture, k, codec)}
    for name, value in parse_knobs(knobs).items():
        field, _, parameter = name.rpartition(".")
        params[field] = {**params.get(field, {}), parameter: value}
    request = pipeline.RepairRequest(named_cache(url, config), spec, specs, capture, params, replace)
    with capture_progress(console()) as progress:
        result = pipeline.repair(request, dry_run, progress)
    say(json.dumps(result) if as_json else repair_lines(result, dry_run))
    if result["left"] and not dry_run:
        sys.exit(1)


@command("add-field")
@cache_named
@click.option("--field", "names", multiple=True, required=True, help="Field to add; repeat for more.")
@click.option(
    "--set", "knobs", multiple=True, metavar="[FIELD.]NAME=VALUE", help="Parameter of the field, e.g. --set codec=int8."
)
@click.option("--teacher", help="Model folder or hub id.")
@click.option(
    "--other-teacher",
    is_flag=True,
    help="Allow another teacher than that of the other fields, with the same vocabulary.",
)
@click.option("--parts-without-fields", help="Parts without the field, comma-separated.")
@click.option("--workers", type=int, help="Worker processes; default: one per GPU.")
@click.option("--encode-workers", type=int, help="Encoding threads per worker; default: from the number of cores.")
@click.option("--batch-tokens", type=int, help="Padded tokens per teacher batch.")
@click.option("--calibration-rows", type=int, help="Rows that the teacher reads before the job, to fit codecs.")
@click.option("--calibration", help="Cache (a preflight's, or any) to take the calibration from; '' fits a new one.")
@click.option("--dtype", help="float32, bfloat16, float16; default: that of the other fields.")
@teacher_options
@config_option
@json_option
def add_field(
    url: str | None,
    names: tuple[str, ...],
    knobs: tuple[str, ...],
    teacher: str | None,
    other_teacher: bool,
    parts_without_fields: str | None,
    trust_remote_code: bool | None,
    config: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Capture more fields from the cache's own samples, without the mixture. Run the command again to continue."""
    from pipelines.edit import fields as pipeline
    from pipelines.settings import override
    from pipelines.terminal.progress import capture_progress

    settings = load(config)
    cache = open_cache(url, config)
    spec = teacher_spec(teacher, settings.teacher, trust_remote_code, **take(flags, RUN_BY))
    need({"--teacher": spec})
    given = pipeline.parse_field_sets(names, parse_knobs(knobs))
    params = {name: {**settings.fields.get(name, {}), **given[name]} for name in names}
    capture = override(settings.capture, parts_without_fields=split(parts_without_fields), **flags)
    with capture_progress(console()) as progress:
        summary = pipeline.add_fields(str(cache.storage), spec, params, capture, other_teacher, progress)
    say_summary(summary, as_json)


@command("drop-field")
@column_named("name")
@click.option(
    "--yes",
    is_flag=True,
    help="Remove the field; without it nothing changes. Never while a run reads the field.",
)
@json_option
def drop_field(url: str | None, name: str, yes: bool, as_json: bool) -> None:
    """Remove one field of a cache. Without --yes, only list its files."""
    from pipelines.edit.fields import drop_field as drop
    from pipelines.terminal.tables import human_bytes

    found = drop(named_cache(url, None), name, remove=yes)
    if as_json:
        say(json.dumps({**vars(found), "removed": yes}))
        return
    what = f"field {name}: {found.shards} shards, {found.files} files, {human_bytes(found.bytes)}"
    say(f"{what} {'removed' if yes else 'would be removed (--yes)'}")
    if yes:
        say("`kdcli cache gc --yes` removes the files under teacher/ that only this field used")


@command()
@cache_named
@click.option("--out", required=True, help="Output cache: a folder or an fsspec URL.")
@click.option("--parts", help="Keep only these parts, comma-separated.")
@click.option("--fields", help="Keep only these fields, comma-separated; default: all.")
@click.option("--keys", type=A_FILE, help="Keep only rows whose keys are in this file, one key per line.")
@click.option(
    "--with-images/--text-only", "images", default=None, help="Keep only rows with images, or only rows without."
)
@click.option("--fraction", type=float, help="Keep about this share of the rows, sampled by a hash of their keys.")
@click.option("--max-rows", type=int, help="Keep at most this many rows, sampled in the same way.")
@click.option("--seed", default=0, show_default=True, help="Sampling seed.")
@click.option("--workers", default=1, show_default=True, help="Copying processes.")
@json_option
def subset(
    url: str | None,
    out: str,
    parts: str | None,
    fields: str | None,
    keys: str | None,
    workers: int,
    as_json: bool,
    **rows: Any,
) -> None:
    """Write a new cache with some rows, parts or fields of a cache, without the teacher. Run the command again to continue."""
    from pipelines.edit.choose_samples import RowFilter, read_keys
    from pipelines.edit.derive import subset as pipeline
    from pipelines.terminal.progress import capture_progress

    chosen = RowFilter(keys=read_keys(keys) if keys else None, **rows)
    with capture_progress(console()) as progress:
        summary = pipeline(named_cache(url, None), out, split(parts), split(fields), chosen, workers, progress)
    say_summary(summary, as_json)


@command()
@click.argument("urls", metavar="CACHE CACHE…", nargs=-1, required=True)
@click.option("--out", required=True, help="Output cache: a folder or an fsspec URL.")
@click.option("--fields", help="Keep only these fields, comma-separated; default: all.")
@click.option(
    "--keep", type=click.Choice(["first"]), help="For rows that several caches hold, keep those of the first cache."
)
@click.option("--workers", default=1, show_default=True, help="Copying processes.")
@json_option
def merge(urls: tuple[str, ...], out: str, fields: str | None, keep: str | None, workers: int, as_json: bool) -> None:
    """Join the rows of several caches in a new one; all must have the same teacher and preparation.
    Run the command again to continue."""
    from pipelines.edit.derive import merge as pipeline
    from pipelines.terminal.progress import capture_progress

    with capture_progress(console()) as progress:
        summary = pipeline(urls, out, split(fields), keep, workers, progress)
    say_summary(summary, as_json)
