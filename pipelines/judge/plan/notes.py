"""What a person should know before trusting an estimate or starting the job."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pipelines.judge.plan.column_sizes import ColumnEstimate
from pipelines.judge.plan.field_sizes import EXACT, MEASURED, FieldSize, RowCounts, differs
from pipelines.judge.plan.mixture_sample import PartSample
from pipelines.settings import CaptureSettings
from pipelines.terminal.tables import human_bytes
from teacher_cache.codecs.fitting import least_rows
from teacher_cache.fields import Field
from teacher_cache.reading.cache import TeacherCache

LARGEST_TAR, SMALLEST_TAR, GOOD_TAR = 2e9, 50e6, 500e6
SHARDS_A_GPU = 4
"""At least, so that no GPU waits long for the last one and a kill loses little."""


def notes(
    settings: CaptureSettings,
    gpus: int,
    fields: Mapping[str, Field],
    sizes: Mapping[str, FieldSize],
    parts: Sequence[PartSample],
    full: Sequence[PartSample],
    columns: Sequence[ColumnEstimate],
    like: TeacherCache | None,
    width: int,
) -> list[str]:
    """What a person should know before trusting or starting this."""
    guessed = [name for name, size in sizes.items() if size.basis not in (EXACT, MEASURED)]
    said = [why for name in guessed if like and (why := differs(like, fields[name]))]
    if guessed:
        said.append(
            f"bytes of {', '.join(guessed)} are defaults from small teachers: `kdcli preflight` measures them, or cache a "
            "few hundred rows and name that cache with --like"
        )
    said += cut_notes(parts)
    return said + calibration_notes(settings, fields, full, width) + shard_notes(settings, gpus, columns)


def cut_notes(parts: Sequence[PartSample]) -> list[str]:
    """What ``over_length = "cut"`` will take away, by part."""
    return [
        f"part {part.part!r}: about {rows:,.0f} rows are cut at a turn border to fit max_length"
        + (f", and lose about {images:,.0f} images" if images else "")
        for part in parts
        if (rows := part.total(lambda row: bool(row.cut[0])))
        for images in [part.total(lambda row: row.cut[1])]
    ]


def calibration_notes(
    settings: CaptureSettings, fields: Mapping[str, Field], full: Sequence[PartSample], width: int
) -> list[str]:
    """Whether the rows that fit the fields are enough for a covariance of this width."""
    usable = sum(part.total(lambda row: 1) for part in full)
    if not usable:
        return []
    said = []
    for name, one in fields.items():
        if one.calibrated and not name.endswith("_topk"):
            mean = sum(part.total(lambda row, one=one: fitted_rows(one, row.counts)) for part in full) / usable  # type: ignore[misc]
            rows = min(settings.calibration_rows, usable) * mean
            if rows < (least := least_rows(width)):
                enough = math.ceil(1.1 * least / mean) if mean else 0
                fix = f"--calibration-rows {enough}" if enough and enough <= usable else "--codec bf16"
                said.append(f"calibration will see about {rows:,.0f} rows of {name}, {least:,} are needed: use {fix}")
    return said


def fitted_rows(one: Field, counts: RowCounts) -> int:
    """Rows that a fit sees of one sample; a field of vision rows nothing of one without images."""
    kinds = one.wants.row_kinds
    return 0 if "vision" in kinds and not counts.vision else sum(getattr(counts, kind) for kind in kinds)


def shard_notes(settings: CaptureSettings, gpus: int, columns: Sequence[ColumnEstimate]) -> list[str]:
    """Where tars come out too large to stream or too small to read well."""
    each = {column.name: column.tar_bytes / column.tars for column in columns if column.tars}
    name, largest = max(each.items(), key=lambda item: item[1])
    shards = max(SHARDS_A_GPU * gpus, round(settings.shards * largest / GOOD_TAR))
    size = f"the largest tars ({name}) come to {human_bytes(largest)} each"
    if largest > LARGEST_TAR:
        return [f"{size}, more than 2 GB: use --shards {shards}"]
    if largest < SMALLEST_TAR and shards < settings.shards:
        return [f"{size}, less than 50 MB: use --shards {shards}"]
    return []
