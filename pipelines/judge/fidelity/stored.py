"""Stored distributions against the live ones, whatever stores them: divergences, gradients, bytes a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.judge.fidelity.measure import DIRECTIONS, Comparison, row_chunks
from pipelines.judge.fidelity.sources import OutputSource
from pipelines.judge.fidelity.student import Student
from student_train.needs import Need, ways
from teacher_cache.models.head import head_logits
from teacher_cache.reading.cache import TeacherCache

KINDS = ("response", "vision")
MOST_BYTES = 1 << 29
"""Gradients of the student's head that are kept at once, one a stored distribution and direction."""
MOST_SHARDS = 64
"""Shards whose indexes are read for bytes a row: a mean does not need all of a large cache's."""


def combinations(cache: TeacherCache, fields: Sequence[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """``"response: response_topk + response_hidden"`` → (row kind, fields): every way that the cache can tell a distribution."""
    codecs = {name: str(cache.fields[name]["params"].get("codec", "")) for name in fields}
    found = {}
    for kind in KINDS:
        for direction in ("forward", "reverse"):
            for way in ways(Need(f"{kind}_logits", direction), codecs):
                found[f"{kind}: {' + '.join(way.fields)}"] = (kind, way.fields)
    return found


def measure_rows(
    kind: str,
    live: OutputSource,
    stored: Mapping[str, OutputSource],
    student: Student,
    directions: Sequence[str] = tuple(DIRECTIONS),
    most_rows: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Name → as ``Comparison.summary`` says it, over all samples' rows of a kind, chunk by chunk; some at a time, as ``MOST_BYTES`` allows.

    Args:
        live: knows the comparison as ``kind``. stored: name → a source that knows it by that name.
        most_rows: compared at most, evenly over all samples; None: all.
    """
    directions = directions if kind == "response" or student.aligned else ()  # no student's row stands on the teacher's
    names, each = list(stored), at_once(student, directions)
    found: dict[str, dict[str, Any]] = {}
    for start in range(0, len(names), each):
        chosen = {name: stored[name] for name in names[start : start + each]}
        found |= _measure_group(kind, live, chosen, student, Comparison(chosen, directions), most_rows)
    return found


def at_once(student: Student, directions: Sequence[str]) -> int:
    """Stored distributions whose gradients, and a head of their own each, may stand beside each other and the live one's."""
    return max(1, MOST_BYTES // (student.head.numel() * 4 * (len(directions) + 1)) - 1)


def _measure_group(
    kind: str,
    live: OutputSource,
    stored: Mapping[str, OutputSource],
    student: Student,
    comparison: Comparison,
    most_rows: int | None,
) -> dict[str, dict[str, Any]]:
    total = sum(len(one[f"{kind}_hidden"]) for one in live.records)
    every = slice(None, None, -(-total // most_rows) or 1 if most_rows else 1)
    for number, states in enumerate(student.rows):
        theirs = live.view(kind, number).distributions[kind][every]
        ours = {name: one.view(name, number).distributions[kind][every] for name, one in stored.items()}
        for rows in row_chunks(len(theirs), student.head):
            hidden = states[kind][every][rows] if comparison.directions else None
            logits = None if hidden is None else head_logits(hidden, student.head, student.cap)
            comparison.add(theirs[rows], {name: one[rows] for name, one in ours.items()}, logits, hidden)  # type: ignore[arg-type]
    return comparison.summary()


def cache_bytes(cache: TeacherCache, parts: Sequence[str], fields: Sequence[str]) -> dict[str, dict[str, float]]:
    """Field → payload bytes (members of the tars) and tar bytes a row of its kind, over ``MOST_SHARDS`` shards of the parts, evenly."""
    every = cache.shards(parts)
    shards = every[:: -(-len(every) // MOST_SHARDS)]
    found = {}
    for name in fields:
        column = cache.column(name)
        kind = "response_rows" if name.startswith("response") else "vision_rows"
        entries = [one for shard in shards for one in column.entries(shard)]
        payload = sum(member.size for one in entries for member in one.members)
        tars = sum(column.commit(shard).tar_bytes for shard in shards)
        rows = max(1, sum(getattr(one, kind) for one in entries))
        found[name] = {"payload_per_row": payload / rows, "tar_per_row": tars / rows, "rows": float(rows)}
    return found


def bytes_of(sizes: Mapping[str, Mapping[str, float]], fields: Sequence[str]) -> dict[str, float]:
    """Bytes a row of several fields of one kind together."""
    return {key: sum(sizes[name][key] for name in fields) for key in ("payload_per_row", "tar_per_row")}
