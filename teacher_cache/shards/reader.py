"""Read a column: any sample by (shard, row), every byte checked before it is handed out."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import OrderedDict
from typing import BinaryIO, Generic, TypeVar

from teacher_cache.errors import CacheError
from teacher_cache.shards.commit import Commit, read_commit
from teacher_cache.shards.index import Entries, parse_index
from teacher_cache.shards.storage import Storage

OPEN_SHARDS = 64
"""Whose tars stay open and whose indices stay in memory; training goes through blocks of 16, so that memory does not grow with the rows."""
T = TypeVar("T")


class Recent(OrderedDict[int, T], Generic[T]):
    """Shard → what was made of it, of the shards that were used last."""

    def take(self, shard: int) -> T | None:
        if shard not in self:
            return None
        self.move_to_end(shard)
        return self[shard]

    def keep(self, shard: int, value: T) -> list[T]:
        """Returns what had to go."""
        self[shard] = value
        return [self.popitem(last=False)[1] for _ in range(len(self) - OPEN_SHARDS)]


class ColumnReader:
    """``samples`` or one field of a cache, opened for reading.

    Args:
        storage: the cache. column: ``samples`` or ``fields/NAME``.
        plan_hash, column_hash: what every commit must be bound to.
    """

    def __init__(self, storage: Storage, column: str, plan_hash: str, column_hash: str):
        self.storage, self.column = storage, column
        self._hashes = (plan_hash, column_hash)
        self._commits: dict[int, Commit] = {}
        self._entries: Recent[Entries] = Recent()
        self._open: Recent[BinaryIO] = Recent()
        self._process = os.getpid()

    def __getstate__(self) -> dict:
        return self.__dict__ | {
            "_open": Recent(),
            "_entries": Recent(),
        }  # file handles do not travel to loader processes

    def commit(self, shard: int) -> Commit:
        if shard not in self._commits:
            commit = read_commit(self.storage, self.column, shard)
            if (commit.plan_hash, commit.column_hash) != self._hashes:
                raise CacheError(
                    f"{self.storage}: shard {shard:06d} of {self.column} was made by another plan or field setting: "
                    "run `kdcli cache verify`"
                )
            self._commits[shard] = commit
        return self._commits[shard]

    def entries(self, shard: int) -> Entries:
        """The samples of a shard in tar order; also checks that the tar has its full size."""
        if (entries := self._entries.take(shard)) is None:
            entries = self._read_index(shard)
            self._entries.keep(shard, entries)
        return entries

    def _read_index(self, shard: int) -> Entries:
        commit = self.commit(shard)
        index_path, tar_path = f"{self.column}/index/{commit.index}", f"{self.column}/data/{commit.tar}"
        try:
            data = self.storage.read(index_path)
            size = self.storage.size(tar_path)
        except FileNotFoundError as error:
            raise self._damaged(commit, f"{error.filename or error} is missing") from None
        if hashlib.sha256(data).hexdigest() != commit.index_sha256:
            raise self._damaged(commit, f"{index_path} does not have its committed checksum")
        if size != commit.tar_bytes:
            raise self._damaged(commit, f"{tar_path} has {size} bytes, its commit says {commit.tar_bytes}")
        return parse_index(data, f"{self.storage}/{index_path}", commit.tar_bytes, commit.written)

    def read(self, shard: int, row: int) -> dict[str, bytes]:
        """Members of one sample by extension; CacheError naming shard and key where a byte is wrong."""
        entry = self.entries(shard)[row]
        if not entry.members:
            return {}
        start = min(member.offset for member in entry.members)
        stop = max(member.offset + member.size for member in entry.members)
        handle = self._tar(shard)
        handle.seek(start)
        data = handle.read(stop - start)
        members = {}
        for member in entry.members:
            content = data[member.offset - start : member.offset - start + member.size]
            if len(content) != member.size or zlib.crc32(content) != member.crc32:
                raise self._damaged(self.commit(shard), f"member {entry.key}.{member.ext} fails its checksum")
            members[member.ext] = content
        return members

    def _tar(self, shard: int) -> BinaryIO:
        if self._process != os.getpid():
            # A forked loader process has our handles, but not positions of its own: two that seek would read each other's bytes.
            self._open, self._process = Recent(), os.getpid()
        if (handle := self._open.take(shard)) is None:
            commit = self.commit(shard)
            try:
                handle = self.storage.open(f"{self.column}/data/{commit.tar}")
            except FileNotFoundError:
                raise self._damaged(commit, f"data/{commit.tar} is missing") from None
            for old in self._open.keep(shard, handle):
                old.close()
        return handle

    def _damaged(self, commit: Commit, what: str) -> CacheError:
        return CacheError(
            f"{self.storage}: shard {commit.shard:06d} of {self.column} is damaged: {what}; `kdcli cache verify` lists all damage"
        )
