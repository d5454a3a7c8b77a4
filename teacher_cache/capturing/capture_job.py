"""What every worker of a capture needs to know, and where it reads its samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from teacher_cache.fields import Field
from teacher_cache.planning.plan import Plan
from teacher_cache.reading.verify import lost
from teacher_cache.records import RowGroup, Sample, SkipRecord
from teacher_cache.shards.commit import committed_shards
from teacher_cache.shards.storage import Storage
from teacher_cache.shards.writer import ShardWriter


class SampleReader(Protocol):
    """What capture asks of a mixture part (``sources.Source``), or of the ``samples`` of a cache (``stored_samples``)."""

    def read(self, group: RowGroup) -> Iterator[Sample | SkipRecord]:
        """The rows of one group in order, exactly ``group.rows`` items."""
        ...


@dataclass(frozen=True)
class CaptureJob:
    """What every worker needs to know, JSON- and pickle-able parts only.

    Attributes:
        fields: field → hash of its ``field.json``; the order is the writing order.
        parts_without_fields: parts of which only ``samples`` is stored (a projector phase without distillation).
        batch_tokens: padded tokens in one teacher batch.
        staging_bytes: as ``ShardWriter`` takes it.
        writer: of a new shard, or of an existing one (``shards/mender.py``).
        keep_rows: an existing shard is written again, and must hold every row that it held.
        encode_workers: threads that encode beside the teacher.
    """

    storage: Storage
    plan: Plan
    fields: Mapping[str, str]
    field_objects: Mapping[str, Field]
    parts_without_fields: frozenset[str] = frozenset()
    batch_tokens: int = 8192
    staging_bytes: int = 0
    writer: type[ShardWriter] = ShardWriter
    keep_rows: bool = False
    encode_workers: int = 1

    def columns(self, shard: int) -> list[str]:
        """Columns of this shard, ``samples`` first."""
        bare = self.plan.slices[shard].part in self.parts_without_fields
        return ["samples"] + ([] if bare else [f"fields/{name}" for name in self.fields])

    def missing(self) -> dict[int, list[str]]:
        """Shards with columns that are not committed, in order."""
        every = ["samples", *(f"fields/{name}" for name in self.fields)]
        done = {column: set(committed_shards(self.storage, column)) for column in every}
        left = {
            shard: [column for column in self.columns(shard) if shard not in done[column]]
            for shard in range(len(self.plan.slices))
        }
        return {shard: columns for shard, columns in left.items() if columns}

    def lost(self) -> dict[int, dict[str, str]]:
        """Shards with columns that are committed and of which a file is gone: shard → column → what, in words."""
        found: dict[int, dict[str, str]] = {}
        for column in ("samples", *(f"fields/{name}" for name in self.fields)):
            column_hash = self.fields.get(column.removeprefix("fields/"), "")
            for shard, what in lost(self.storage, self.plan, column, column_hash).items():
                found.setdefault(shard, {})[column] = what
        return dict(sorted(found.items()))
