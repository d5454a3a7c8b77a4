"""The samples of a cache, read back: each with its text tokens, its layout, and everything that a run asked for.

A shard's index is read when its first sample is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from teacher_cache.codecs import container
from teacher_cache.errors import CacheError
from teacher_cache.fields import decode_records, shape_of
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.sample_checks import check_numbers, check_shapes
from teacher_cache.records import ImageLayout, Sample, TextTokens
from teacher_cache.samples import TEXT, decode_sample
from teacher_cache.shards.commit import Commit
from teacher_cache.shards.disk_cache import DiskCache
from teacher_cache.shards.index import Entries
from teacher_cache.shards.reader import Recent


@dataclass(frozen=True)
class CachedSample:
    """One row: the sample as the mixture held it, its text tokens and layout as the teacher read them, decoded fields."""

    key: str
    sample: Sample
    text: TextTokens
    layout: tuple[ImageLayout, ...]
    fields: dict[str, Any]


class CachedSamples:
    """The rows of some parts that ``samples`` and all the asked fields hold, by (shard number in ``shards``, row).

    Args:
        disk: where tars of an object store are kept; None: every row is read from the store.
        coded: fields that tell the two apart are read, not restored (``signal_records.Coded``): the training device does it.
        shards: of these parts, the only ones to read; None: all.
        pictures: False: images come without their bytes, which are not read.
    """

    def __init__(
        self,
        cache: TeacherCache,
        parts: Sequence[str],
        fields: Sequence[str],
        disk: DiskCache | None = None,
        coded: bool = False,
        shards: Sequence[int] | None = None,
        pictures: bool = True,
    ):
        self.shards = cache.shards(parts) if shards is None else list(shards)
        self.coded, self._pictures = coded, pictures
        self._members = {} if pictures else {"samples": TEXT}
        self._storage, self._disk = cache.storage, disk
        self._columns = {name: cache.column(name, disk) for name in ("samples", *fields)}
        self._fields = {name: cache.open_field(name) for name in fields}
        self._shapes = {name: shape_of(field) for name, field in self._fields.items()}
        self._described = {name: cache.fields[name] for name in fields}
        self._parts = [one.part for one in cache.plan.slices]
        self._rows: Recent[np.ndarray] = Recent()
        for column in self._columns.values():
            column.load_commits(self.shards)
        self.counts = [self._count(shard) for shard in self.shards]
        self._place = str(cache.storage)

    @property
    def remote(self) -> bool:
        """Whether requests are to be saved."""
        return not self._storage.local

    def largest_block(self, shards: int) -> int:
        """Bytes of all tars of the ``shards`` largest shards."""
        sizes = (sum(column.commit(shard).tar_bytes for column in self._columns.values()) for shard in self.shards)
        return sum(sorted(sizes, reverse=True)[:shards])

    def expect(self, positions: Sequence[int], later: Sequence[int]) -> None:
        """Rows of the shards at ``positions`` are read next, then those of ``later``: indices are read, tars fetched in the background."""
        for column in self._columns.values():
            column.load_entries([self.shards[position] for position in positions])
        if self._disk and self.remote:
            shards = [self.shards[position] for position in (*positions, *later)]
            wanted = [(column.column, column.commit(shard)) for shard in shards for column in self._columns.values()]
            self._disk.prefetch(self._storage, wanted)

    def pause(self) -> None:
        """Before this process forks: nothing is being fetched in the background."""
        if self._disk:
            self._disk.pause()

    def read_many(self, places: Sequence[tuple[int, int]]) -> list[CachedSample]:
        """Rows by (position of the shard in ``shards``, row of it); CacheError naming shard and key where one is damaged.

        What a store is asked for them it is asked all at once, and so is what a field decodes.
        """
        found = self._read_members(places)
        samples = [
            decode_sample(members["samples"], f"{self._place} shard {shard:06d} {key}", self._pictures)
            for shard, key, members in found
        ]
        fields: list[dict[str, Any]] = [{} for _ in found]
        for name, field in self._fields.items():
            records = [
                self._record(members[name], self._record_place(shard, name, key)) for shard, key, members in found
            ]
            for one, decoded in zip(fields, decode_records(field, records, self.coded), strict=True):
                one[name] = decoded
        for (shard, key, _), (sample, text, layout), decoded in zip(found, samples, fields):
            if sample.part != self._parts[shard]:
                raise CacheError(
                    f"{self._record_place(shard, 'samples', key)}: its part {sample.part[:60]!r} is not the shard's"
                )
            place = partial(self._record_place, shard, key=key)
            check_shapes(decoded, self._shapes, text, layout, place)
            check_numbers(decoded, self._shapes, self._described, place)
        return [CachedSample(key, *sample, decoded) for (_, key, _), sample, decoded in zip(found, samples, fields)]

    def read(self, position: int, row: int) -> CachedSample:
        """``read_many`` of one row."""
        return self.read_many([(position, row)])[0]

    def _record_place(self, shard: int, name: str, key: str) -> str:
        return f"{self._place} shard {shard:06d} {name} {key}"

    @staticmethod
    def _record(members: Mapping[str, bytes], place: str) -> tuple[bytes, str]:
        data = members.get(container.EXTENSION)
        if data is None:
            raise CacheError(f"{place}: the sample has no member {container.EXTENSION}: run `kdcli cache verify`")
        return data, place

    def _read_members(self, places: Sequence[tuple[int, int]]) -> list[tuple[int, str, dict[str, dict[str, bytes]]]]:
        """(shard, key, members by column) of every row."""
        shards = [self.shards[position] for position, _ in places]
        rows = [dict(zip(self._columns, self._joined(position)[row].tolist())) for position, row in places]
        fetched: dict[tuple[str, int, int], bytes] = {}
        if self.remote and not self._disk:
            wanted = [(name, shard, row) for shard, one in zip(shards, rows) for name, row in one.items()]
            ranges = [self._columns[name].place(shard, row, self._members.get(name)) for name, shard, row in wanted]
            fetched = dict(zip(wanted, self._storage.read_ranges(ranges)))
        return [
            (
                shard,
                self._columns["samples"].entries(shard).key(one["samples"]),
                {
                    name: self._columns[name].read(shard, row, fetched.get((name, shard, row)), self._members.get(name))
                    for name, row in one.items()
                },
            )
            for shard, one in zip(shards, rows)
        ]

    def _count(self, shard: int) -> int:
        """Rows of a shard from its commits alone: what ``samples`` wrote, less what a field had to skip besides."""
        samples, *others = [column.commit(shard) for column in self._columns.values()]

        def skipped(commit: Commit) -> set[int]:
            return {skip.ordinal for skip in commit.skipped}

        extra = set().union(*(skipped(other) for other in others)) - skipped(samples)
        if len(extra) > samples.written:
            raise CacheError(
                f"{self._storage}: shard {shard:06d}: a field skips more rows than samples has; run `kdcli cache verify`"
            )
        return samples.written - len(extra)

    def _join(self, shard: int) -> np.ndarray:
        """Tar rows ``[usable rows, columns]``; by key, since a field may lack rows that ``samples`` has."""
        if (rows := self._rows.take(shard)) is None:
            keys = [column.entries(shard).keys() for column in self._columns.values()]
            if all(one == keys[0] for one in keys):
                rows = np.repeat(np.arange(len(keys[0]))[:, None], len(keys), axis=1)
            else:
                by_key = [{key: row for row, key in enumerate(one)} for one in keys]
                common = [key for key in keys[0] if all(key in one for one in by_key)]
                rows = np.array([[one[key] for one in by_key] for key in common], dtype=np.int64).reshape(-1, len(keys))
            self._rows.keep_rows(shard, rows, len)
        return rows

    def key(self, position: int, row: int) -> str:
        """Key of a row, without reading it."""
        return self._entries_of(position).key(int(self._join(self.shards[position])[row][0]))

    def tokens(self, places: Sequence[tuple[int, int]]) -> list[int]:
        """Text and vision tokens of rows by (position of the shard in ``shards``, row), as the teacher read them: from indices alone."""
        samples = self._columns["samples"]
        samples.load_entries(sorted({self.shards[position] for position, _ in places}))
        return [self._entries_of(position).tokens(self._in_samples(position, row)) for position, row in places]

    def _entries_of(self, position: int) -> Entries:
        return self._columns["samples"].entries(self.shards[position])

    def _in_samples(self, position: int, row: int) -> int:
        """The row in the tar of ``samples``. Indices of fields are read only where one lacks rows."""
        whole = self.counts[position] == self._columns["samples"].commit(self.shards[position]).written
        return row if whole else int(self._joined(position)[row][0])

    def keys(self) -> Iterator[str]:
        """Keys of all rows, shard after shard."""
        for position, count in enumerate(self.counts):
            yield from (self.key(position, row) for row in range(count))

    def _joined(self, position: int) -> np.ndarray:
        """``_join`` of the shard at ``position``; CacheError where its columns do not have the rows that their commits say."""
        shard = self.shards[position]
        rows = self._join(shard)
        if len(rows) != self.counts[position]:
            raise CacheError(
                f"{self._place}: shard {shard:06d}: columns disagree on their rows; run `kdcli cache verify`"
            )
        return rows
