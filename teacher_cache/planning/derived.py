"""Caches made of other caches: the plan of chosen rows, and their shards, copied member by member; nothing is encoded again.

A row keeps its key, ordinal and skip record; a shard of the new cache holds rows of one shard of one old one, in their order there.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from teacher_cache.errors import CacheError
from teacher_cache.planning.plan import Part, Plan, Slice
from teacher_cache.records import RowGroup
from teacher_cache.samples import cut_counts
from teacher_cache.shards.reader import ColumnReader
from teacher_cache.shards.writer import ShardWriter


@dataclass(frozen=True)
class Choice:
    """What one shard of the new cache is made of.

    Attributes:
        cache: number of the cache among those that are read. shard: its shard there. part: of that shard.
        ordinals: the rows, those that the shard skips too where their skip records are taken along.
    """

    cache: int
    shard: int
    part: str
    ordinals: frozenset[int]


def derived_plan(plans: Sequence[Plan], choices: Sequence[Choice], by: str, chosen_by: Mapping[str, Any]) -> Plan:
    """The plan of a cache with one shard a choice.

    Args:
        plans: of the caches that are read; they agree on the preparation and on what makes rows of a part.
        by: the command, ``subset`` or ``merge``. chosen_by: how it chose, JSON-able.
    """
    rows: Counter[str] = Counter()
    for choice in choices:
        rows[choice.part] += len(choice.ordinals)
    derived = {
        "by": by,
        "from": [plan.plan_hash for plan in plans],
        "filter": dict(chosen_by),
        "rows_sha256": _rows_hash(choices),
    }
    parts = tuple(_part(name, plans, rows[name]) for name in rows)
    slices = tuple(Slice(choice.part, (_group(choice),)) for choice in choices)
    return Plan(parts, slices, plans[0].preparation, plans[0].seed, derived)


def _rows_hash(choices: Sequence[Choice]) -> str:
    digest = hashlib.sha256()
    for one in choices:
        digest.update(f"{one.cache} {one.shard} {one.part} {sorted(one.ordinals)}\n".encode())
    return digest.hexdigest()


def _group(choice: Choice) -> RowGroup:
    """The locator says where the rows came from; they are read from the new cache's own ``samples`` (``stored_samples``)."""
    locator = {"cache": choice.cache, "shard": choice.shard}
    return RowGroup(min(choice.ordinals), len(choice.ordinals), locator, characters=0, images=0)


def _part(name: str, plans: Sequence[Plan], rows: int) -> Part:
    """One part out of those of this name: the files of all of them, each once."""
    found = [part for plan in plans for part in plan.parts if part.spec.part == name]
    formats = dict.fromkeys(str(part.fingerprint.get("format")) for part in found)
    files = {str(sorted(file.items())): file for part in found for file in part.fingerprint.get("files", [])}
    paths = dict.fromkeys(part.spec.path for part in found)
    spec = replace(found[0].spec, path=", ".join(paths))
    return Part(spec, {"format": ", ".join(formats), "files": list(files.values())}, rows)


def ordinals_of(samples: ColumnReader, shard: int) -> Iterator[int]:
    """Every row of a shard, written or skipped."""
    yield from (entry.ordinal for entry in samples.entries(shard))
    yield from (skip.ordinal for skip in samples.commit(shard).skipped)


def copy_shard(reader: ColumnReader, choice: Choice, writer: ShardWriter) -> None:
    """Write and commit one shard of one column; CacheError where the old column does not have the chosen rows."""
    taken = 0
    try:
        for row, entry in enumerate(reader.entries(choice.shard)):
            if entry.ordinal in choice.ordinals:
                members = reader.read(choice.shard, row)
                writer.copy(entry, members)
                if reader.column == "samples":
                    writer.count(cut_counts(members, f"{reader.storage}: sample {entry.key}"))
                taken += 1
        for skip in reader.commit(choice.shard).skipped:
            if skip.ordinal in choice.ordinals:
                writer.skip(skip)
                taken += 1
        if taken != len(choice.ordinals):
            raise CacheError(
                f"{reader.storage}: shard {choice.shard:06d} of {reader.column} has {taken} of the {len(choice.ordinals)} rows "
                "that samples has: `kdcli cache verify` lists all damage"
            )
    except BaseException:
        writer.abandon()
        raise
    writer.commit()
