"""Read a column: any sample by (shard, row), every byte checked before it is handed out.

A local cache is read in place. Of an object store, tars are read from a local disk cache where there is one, else row by row in exact
ranges; rows that follow one another come many in one request.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import BinaryIO, Generic, TypeVar

from teacher_cache.errors import CacheError
from teacher_cache.shards.commit import Commit, read_commits
from teacher_cache.shards.disk_cache import DiskCache
from teacher_cache.shards.index import Entries, TarMember, parse_index
from teacher_cache.shards.storage import Storage

OPEN_SHARDS, OPEN_CACHED_TARS = 64, 16
"""Whose tars stay open and whose indices stay in memory: training goes through blocks of 16, and memory does not grow with the rows.
Open files of a disk cache cannot be evicted meanwhile, so they are as few as are read at a time."""
MOST_KEPT_ROWS = 1 << 23
"""Rows of all indices in memory, about 100 bytes each."""
MOST_SAMPLE = 1 << 30
"""Bytes of a sample in its tar: 32,768 rows of 8,192 float32."""
READ_AHEAD = 8 << 20
"""Bytes of one request where rows are read one after the other."""
T = TypeVar("T")


class Recent(OrderedDict[int, T], Generic[T]):
    """Shard → what was made of it, of the shards that were used last."""

    def take(self, shard: int) -> T | None:
        if shard not in self:
            return None
        self.move_to_end(shard)
        return self[shard]

    def keep(self, shard: int, value: T, most: int | None = None) -> list[T]:
        """Returns what had to go."""
        self[shard] = value
        return [self.popitem(last=False)[1] for _ in range(len(self) - (OPEN_SHARDS if most is None else most))]

    def keep_rows(self, shard: int, value: T, rows: Callable[[T], int]) -> None:
        """Besides, all together have few enough rows; that of ``shard`` stays."""
        self.keep(shard, value)
        while len(self) > 1 and sum(map(rows, self.values())) > MOST_KEPT_ROWS:
            self.popitem(last=False)


class ColumnReader:
    """``samples`` or one field of a cache, opened for reading.

    Args:
        storage: the cache. column: ``samples`` or ``fields/NAME``.
        plan_hash, column_hash: what every commit must be bound to.
        disk: where tars of an object store are kept; None: nowhere.
        slice_rows: rows of every slice of the plan, which commits must count; None: nobody knows.
    """

    def __init__(
        self,
        storage: Storage,
        column: str,
        plan_hash: str,
        column_hash: str,
        disk: DiskCache | None = None,
        slice_rows: Sequence[int] | None = None,
    ):
        self.storage, self.column, self._slice_rows = storage, column, slice_rows
        self.disk = None if storage.local else disk
        self._hashes = (plan_hash, column_hash)
        self._commits: dict[int, Commit] = {}
        self._entries: Recent[Entries] = Recent()
        self._open: Recent[BinaryIO] = Recent()
        # shard, row read last, where the bytes begin, bytes
        self._ahead: tuple[int, int, int, bytes] = (-1, -1, 0, b"")
        self._process = os.getpid()

    def __getstate__(self) -> dict:
        return self.__dict__ | {
            "_open": Recent(),
            "_entries": Recent(),
        }  # file handles do not travel to loader processes

    def commit(self, shard: int) -> Commit:
        self.load_commits([shard])
        return self._commits[shard]

    def load_commits(self, shards: Sequence[int]) -> None:
        """Read and check the commits of shards, all at once."""
        new = [shard for shard in shards if shard not in self._commits]
        for shard, commit in zip(new, read_commits(self.storage, self.column, new) if new else ()):
            if (commit.plan_hash, commit.column_hash) != self._hashes:
                raise CacheError(
                    f"{self.storage}: shard {shard:06d} of {self.column} was made by another plan or field setting: "
                    "run `kdcli cache verify`"
                )
            if self._slice_rows is not None and (wrong := other_rows(commit, self._slice_rows)):
                raise self._damaged(commit, wrong)
            self._commits[shard] = commit

    def entries(self, shard: int) -> Entries:
        """The samples of a shard in tar order; also checks that a local tar has its full size."""
        if (entries := self._entries.take(shard)) is None:
            self.load_entries([shard])
            entries = self._entries[shard]
        return entries

    def load_entries(self, shards: Sequence[int]) -> None:
        """Read and check the indices of shards, all at once."""
        new = [shard for shard in shards if shard not in self._entries]
        self.load_commits(new)
        try:
            every = self.storage.read_each([f"{self.column}/index/{self._commits[shard].index}" for shard in new])
            for shard, data in zip(new, every):
                self._entries.keep_rows(shard, self._parse_entries(self._commits[shard], data), len)
        except FileNotFoundError as error:
            if len(new) > 1:
                for shard in new:
                    self.load_entries([shard])
                return
            raise self._damaged(self._commits[new[0]], f"{error.filename or error} is missing") from None

    def _parse_entries(self, commit: Commit, data: bytes) -> Entries:
        index_path, tar_path = f"{self.column}/index/{commit.index}", self._tar_path(commit)
        if hashlib.sha256(data).hexdigest() != commit.index_sha256:
            raise self._damaged(commit, f"{index_path} does not have its committed checksum")
        if self.storage.local:  # a store's answer would cost a request, and is checked when bytes are asked for
            try:
                size = self.storage.size(tar_path)
            except FileNotFoundError as error:
                raise self._damaged(commit, f"{error.filename or error} is missing") from None
            if size != commit.tar_bytes:
                raise self._damaged(commit, f"{tar_path} has {size} bytes, not the {commit.tar_bytes} of its commit")
        return parse_index(data, f"{self.storage}/{index_path}", commit.tar_bytes, commit.written)

    def place(self, shard: int, row: int, only: frozenset[str] | None = None) -> tuple[str, int, int]:
        """(file, first byte, last byte + 1) of a sample; 0, 0 for one without members."""
        return self._tar_path(self.commit(shard)), *self._span(shard, row, self._members(shard, row, only))

    def _members(self, shard: int, row: int, only: frozenset[str] | None) -> tuple[TarMember, ...]:
        members = self.entries(shard).members(row)
        return members if only is None else tuple(one for one in members if one.ext in only)

    def read(
        self, shard: int, row: int, data: bytes | None = None, only: frozenset[str] | None = None
    ) -> dict[str, bytes]:
        """Members of one sample by extension; CacheError naming shard and key where a byte is wrong.

        Args:
            data: the bytes of ``place(shard, row, only)``, if they were read already. only: extensions; None: all.
        """
        members = self._members(shard, row, only)
        start, stop = self._span(shard, row, members)
        if stop == 0:
            return {}
        try:
            given = self._bytes(shard, row, start, stop) if data is None else data
            return self._checked(shard, row, members, start, given)
        except CacheError:
            if self.storage.local:
                raise
            self._forget(shard)  # a store is asked once more: bytes may have been damaged on their way
            return self._checked(shard, row, members, start, self._bytes(shard, row, start, stop))

    def _checked(self, shard: int, row: int, members: Sequence[TarMember], start: int, data: bytes) -> dict[str, bytes]:
        """Contents by extension, each with its checksum."""
        contents = {}
        for member in members:
            content = data[member.offset - start : member.offset - start + member.size]
            if len(content) != member.size or zlib.crc32(content) != member.crc32:
                key = self.entries(shard).key(row)
                raise self._damaged(self.commit(shard), f"member {key}.{member.ext} fails its checksum")
            contents[member.ext] = content
        return contents

    def _bytes(self, shard: int, row: int, start: int, stop: int) -> bytes:
        if handle := self._tar(shard):
            handle.seek(start)
            return handle.read(stop - start)
        last_shard, last_row, begin, ahead = self._ahead
        if (shard, row) == (last_shard, last_row + 1):
            if stop > begin + len(ahead):
                entries = self.entries(shard)
                members = entries.members(len(entries) - 1)
                end = max((member.offset + member.size for member in members), default=stop)
                begin, ahead = start, self._range(shard, start, max(stop, min(start + READ_AHEAD, end)))
            self._ahead = shard, row, begin, ahead
            return ahead[start - begin : stop - begin]
        self._ahead = shard, row, 0, b""
        return self._range(shard, start, stop)

    def _range(self, shard: int, start: int, stop: int) -> bytes:
        commit = self.commit(shard)
        try:
            return self.storage.read_ranges([(self._tar_path(commit), start, stop)])[0]
        except FileNotFoundError:
            raise self._damaged(commit, f"data/{commit.tar} is missing") from None

    def _tar(self, shard: int) -> BinaryIO | None:
        """The tar as an open local file; None where the store must be asked."""
        if self._process != os.getpid():
            # A forked loader process has our handles, but not positions of its own: two that seek would read each other's bytes.
            self._open, self._process = Recent(), os.getpid()
        if handle := self._open.take(shard):
            return handle
        commit = self.commit(shard)
        if not self.storage.local:
            opened = self.disk.open(self.storage, self.column, commit) if self.disk else None
        else:
            try:
                opened = self.storage.open(self._tar_path(commit))
            except FileNotFoundError:
                raise self._damaged(commit, f"data/{commit.tar} is missing") from None
        if opened:
            most = OPEN_SHARDS if self.storage.local else OPEN_CACHED_TARS
            for old in self._open.keep(shard, opened, most):
                old.close()
        return opened

    def _forget(self, shard: int) -> None:
        """Drop what is kept of a tar, in memory and in the disk cache: its bytes are wrong."""
        self._ahead = (-1, -1, 0, b"")
        if self.disk and shard in self._open:
            self._open.pop(shard).close()
            self.disk.discard(self.commit(shard))

    def _span(self, shard: int, row: int, members: Sequence[TarMember]) -> tuple[int, int]:
        """First byte and last byte + 1 of a sample's members in its tar; 0, 0 for one without members."""
        start = min((member.offset for member in members), default=0)
        stop = max((member.offset + member.size for member in members), default=0)
        if max(stop - start, sum(member.size for member in members)) > MOST_SAMPLE:
            key = self.entries(shard).key(row)
            raise self._damaged(self.commit(shard), f"sample {key} has more than {MOST_SAMPLE:,} bytes")
        return start, stop

    def _tar_path(self, commit: Commit) -> str:
        return f"{self.column}/data/{commit.tar}"

    def _damaged(self, commit: Commit, what: str) -> CacheError:
        return CacheError(
            f"{self.storage}: shard {commit.shard:06d} of {self.column} is damaged: {what}; `kdcli cache verify` lists all damage"
        )


def other_rows(commit: Commit, slice_rows: Sequence[int]) -> str:
    """Where a commit does not count the rows of its slice of the plan, in words; "" where it does."""
    if commit.shard >= len(slice_rows):
        return f"its commit is of a shard that the plan has not ({len(slice_rows)} shards)"
    planned = slice_rows[commit.shard]
    return "" if commit.rows == planned else f"its commit counts {commit.rows:,} rows, the plan {planned:,}"
