"""What a cache weighs, column by column, and what one token of it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.terminal.tables import human_bytes
from teacher_cache.errors import SKIP_REASONS
from teacher_cache.reading.cache import TeacherCache

KINDS = {"vision": "vision_rows", "response": "response_rows", "text": "text_tokens"}


@dataclass(frozen=True)
class ColumnSize:
    """One column. bar: percent of the largest. per_token: (bytes, kind of token)."""

    name: str
    shards: str
    complete: bool
    rows: int
    bytes: str
    bar: float
    share: float
    per_row: str
    per_token: list[tuple[str, str]]


@dataclass(frozen=True)
class Sizes:
    """All columns, the largest first. skips: (count, reason, what it means). full: bytes that raw logits would take."""

    columns: list[ColumnSize]
    total: str
    planned: int
    written: int
    skips: list[tuple[int, str, str]]
    tokens: list[tuple[str, int]]
    full: str


def cache_sizes(cache: TeacherCache, body: Mapping[str, Any]) -> Sizes:
    """body: ``inspect_cache.status``, read from the commits alone, so it costs little on a large cache."""
    found = sorted(body["columns"].items(), key=lambda item: -item[1]["bytes"])
    total = sum(one["bytes"] for _, one in found)
    columns = [_column(cache, name, one, found[0][1]["bytes"], total) for name, one in found]
    samples = body["columns"]["samples"]
    skips = sorted(((count, reason) for reason, count in samples["skipped"].items()), reverse=True)
    return Sizes(
        columns=columns,
        total=human_bytes(total),
        planned=body["rows"],
        written=samples["written"],
        skips=[(count, reason, SKIP_REASONS.get(reason, "")) for count, reason in skips],
        tokens=[(kind, samples["counts"].get(key, 0)) for kind, key in KINDS.items()],
        full=_full_logits(cache, samples["counts"]),
    )


def _column(cache: TeacherCache, name: str, one: dict[str, Any], largest: int, total: int) -> ColumnSize:
    size, counts = one["bytes"], one["counts"]
    kinds = [kind for kind in _kinds(cache, name) if counts.get(KINDS[kind])]
    return ColumnSize(
        name=name.removeprefix("fields/"),
        shards=f"{one['done']}/{one['shards']}",
        complete=one["done"] == one["shards"],
        rows=one["written"],
        bytes=human_bytes(size),
        bar=round(100 * size / largest, 2) if largest else 0.0,
        share=100 * size / total if total else 0.0,
        per_row=human_bytes(size / one["written"]) if one["written"] else "–",
        per_token=[(human_bytes(size / counts[KINDS[kind]]), kind) for kind in kinds],
    )


def _kinds(cache: TeacherCache, column: str) -> list[str]:
    """The kinds of token that a column describes: what it wanted of the teacher says which."""
    if column == "samples":
        return ["text"]
    wants = cache.open_field(column.removeprefix("fields/")).wants
    return [kind for kind in KINDS if kind in wants.row_kinds]


def _full_logits(cache: TeacherCache, counts: dict[str, int]) -> str:
    """What bf16 logits of the same vision and response positions would take: the yardstick of every field."""
    widths = [body.get("teacher", {}).get("tokenizer", {}).get("length", 0) for body in cache.fields.values()]
    rows = counts.get("vision_rows", 0) + counts.get("response_rows", 0)
    return human_bytes(2 * rows * max(widths)) if widths and max(widths) and rows else ""
