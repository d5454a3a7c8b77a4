"""Stored distributions against the live ones, whatever stores them: divergences, gradients, bytes a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.fidelity.measure import DistributionTally, row_chunks
from pipelines.fidelity.sources import Source
from pipelines.fidelity.student import Student
from student_train.cache import Cache
from student_train.needs import Need, ways
from teacher_cache.teachers.head import head_logits

KINDS = ("response", "vision")
MOST_SHARDS = 64
"""Shards whose indexes are read for bytes a row: a mean does not need all of a large cache's."""


def combinations(cache: Cache, fields: Sequence[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """``"response: response_topk + response_hidden"`` → (row kind, fields): every way that the cache can tell a distribution."""
    codecs = {name: str(cache.fields[name]["params"].get("codec", "")) for name in fields}
    found = {}
    for kind in KINDS:
        for direction in ("forward", "reverse"):
            for way in ways(Need(f"{kind}_logits", direction), codecs):
                found[f"{kind}: {' + '.join(way.fields)}"] = (kind, way.fields)
    return found


def measure_rows(name: str, kind: str, live: Source, stored: Source, student: Student) -> dict[str, Any]:
    """``measure.distribution_error`` over all samples' rows of a kind, chunk by chunk.

    Args:
        name: what both sources know this comparison as.
    """
    tally = DistributionTally()
    for number, states in enumerate(student.rows):
        hidden = states[kind]
        if not len(hidden):
            continue
        theirs, ours = (one.view(name, number).distributions[kind] for one in (live, stored))
        for rows in row_chunks(len(hidden), student.head):
            logits = head_logits(hidden[rows], student.head, student.cap)
            tally.add(theirs[rows], ours[rows], logits, hidden[rows])  # type: ignore[arg-type]
    return tally.summary()


def cache_bytes(cache: Cache, parts: Sequence[str], fields: Sequence[str]) -> dict[str, dict[str, float]]:
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
