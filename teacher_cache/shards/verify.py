"""Every checksum of a cache, and what lies around without belonging to it."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from teacher_cache.errors import CacheError
from teacher_cache.plan import Plan, read_plan
from teacher_cache.shards.commit import Commit, committed_shards, read_commit
from teacher_cache.shards.index import Entries, parse_index
from teacher_cache.shards.storage import Storage

CALIBRATION_ROLES = ("calibration", "low_rank_head")
"""What ``field.json`` may name besides its own folder."""


@dataclass(frozen=True)
class Problem:
    """What is wrong and where; ``shard`` is None for files that belong to none."""

    column: str
    shard: int | None
    what: str

    def __str__(self) -> str:
        where = f"{self.column} shard {self.shard:06d}" if self.shard is not None else self.column
        return f"{where}: {self.what}"


def verify(
    storage: Storage, columns: dict[str, str], advance: Callable[[int], None] = lambda shards: None
) -> list[Problem]:
    """Read everything once and compare with what commits promise.

    Args:
        columns: column → hash that its commits must be bound to ("" for samples).
    """
    plan = read_plan(storage)
    problems = []
    for column, column_hash in columns.items():
        for shard in committed_shards(storage, column):
            problems += [
                Problem(column, shard, what) for what in shard_problems(storage, plan, column, column_hash, shard)
            ]
            advance(1)
    return problems


def shard_problems(storage: Storage, plan: Plan, column: str, column_hash: str, shard: int) -> Iterator[str]:
    """What is wrong with one committed shard, in words."""
    try:
        commit = read_commit(storage, column, shard)
        if commit.plan_hash != plan.plan_hash or commit.column_hash != column_hash:
            yield "its commit belongs to another plan or field setting"
        if shard >= len(plan.slices) or commit.rows != plan.slices[shard].rows:
            yield f"its commit counts {commit.rows} rows, the plan does not"
        index = storage.read(f"{column}/index/{commit.index}")
        if hashlib.sha256(index).hexdigest() != commit.index_sha256:
            yield f"index/{commit.index} does not have its checksum"
            return
        entries = parse_index(index, commit.index, commit.tar_bytes, commit.written)
        yield from _tar_problems(storage, column, commit, entries)
    except FileNotFoundError as error:
        yield f"a file is missing ({error.filename or error})"
    except CacheError as error:
        yield str(error)


def _tar_problems(storage: Storage, column: str, commit: Commit, entries: Entries) -> Iterator[str]:
    with storage.local_copy(f"{column}/data/{commit.tar}") as path:
        yield from _file_problems(path, commit, entries)


def _file_problems(path: Path, commit: Commit, entries: Entries) -> Iterator[str]:
    with path.open("rb") as tar:
        digest, size = hashlib.file_digest(tar, "sha256"), tar.tell()
    if size != commit.tar_bytes:
        yield f"data/{commit.tar} has {size} bytes, not {commit.tar_bytes}"
        return
    if digest.hexdigest() != commit.tar_sha256:
        yield f"data/{commit.tar} does not have its checksum"
        return
    promised = [
        (f"{entry.key}.{member.ext}", member.offset, member.size) for entry in entries for member in entry.members
    ]
    with path.open("rb") as opened:
        found = _members(opened)
    if found != promised:
        yield f"data/{commit.tar} does not hold the members that its index lists"


def _members(opened: BinaryIO) -> list[tuple[str, int, int]] | None:
    """(name, offset, size) of every member, read by the tar's own headers; None where it is no tar of plain files."""
    try:
        with tarfile.open(fileobj=opened, mode="r:") as tar_file:
            every = list(tar_file)
    except (tarfile.TarError, ValueError, OverflowError, EOFError):
        return None
    plain = all(info.type == tarfile.REGTYPE and not info.pax_headers for info in every)
    return [(info.name, info.offset_data, info.size) for info in every] if plain else None


def orphans(storage: Storage, columns: dict[str, str]) -> list[str]:
    """Files that no commit names: left by killed or second writers, safe to remove while nothing writes."""
    found = [f".staging/{name}" for name in storage.names(".staging")]
    teachers = [f"teacher/{name}" for name in storage.names("teacher")]
    described = [folder for column in columns for folder in (column, f"{column}/commits")]
    for folder in ("", *teachers, *described):
        # Drafts of put-if-absent, left by a kill between writing one and linking it to its name.
        drafts = [name for name in storage.names(folder) if name.startswith(".") and ".json." in name]
        found += [f"{folder}/{name}".lstrip("/") for name in drafts]
    for column in columns:
        named: set[str] = set()
        for shard in committed_shards(storage, column):
            commit = read_commit(storage, column, shard)
            named |= {commit.tar, commit.index}
        for folder in ("data", "index"):
            found += [f"{column}/{folder}/{name}" for name in storage.names(f"{column}/{folder}") if name not in named]
    return found
