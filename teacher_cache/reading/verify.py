"""Every checksum of a cache, and what lies around without belonging to it."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from teacher_cache.errors import CacheError
from teacher_cache.planning.plan import Plan
from teacher_cache.planning.plan_file import read_plan
from teacher_cache.shards.commit import Commit, committed_shards, read_commit, read_commits
from teacher_cache.shards.index import Entries, parse_index
from teacher_cache.shards.plain_files import open_plain, regular_size
from teacher_cache.shards.reader import other_rows
from teacher_cache.shards.storage import Storage

_SHARD = r"[0-9]{6,10}"
OWN = re.compile(
    rf"""\.staging/([0-9a-f]{{32}}-[^/]+|[^/]+-{_SHARD}-[0-9a-f]{{32}}\.tar)
    |(samples|fields/[^/]+)/data/{_SHARD}-[0-9a-f]{{8}}\.tar
    |(samples|fields/[^/]+)/index/{_SHARD}-[0-9a-f]{{8}}(-[0-9a-f]{{8}})?\.parquet
    |(samples|fields/[^/]+)/commits/{_SHARD}\.json
    |fields/[^/]+/field\.json
    |teacher/[^/]+/((head|canaries)\.safetensors|(head|processor|canaries)\.json|(calibration|processor)/[^/]+)
    |(samples|fields/[^/]+)/(data|index)/\.{_SHARD}-[^/]+\.(tar|parquet)\.[0-9a-f]{{32}}
    |([^/]+/)*\.(manifest|field|head|processor|canaries|{_SHARD})\.json\.[0-9a-f]{{32}}""",
    re.VERBOSE,
)
"""Paths that kdcli gives to files of a cache, drafts (across disks, of a put-if-absent) last. What is called otherwise is
nobody's garbage."""
CALIBRATION_ROLES = ("calibration", "low_rank_head")
"""What ``field.json`` may name besides its own folder."""
PARQUET = b"PAR1"
"""How such a file begins, and ends."""


@dataclass(frozen=True)
class Problem:
    """What is wrong and where; ``shard`` is None for files that belong to none."""

    column: str
    shard: int | None
    what: str

    def __str__(self) -> str:
        where = f"{self.column} shard {self.shard:06d}" if self.shard is not None else self.column
        return f"{where}: {self.what}"


def verify(storage: Storage, columns: dict[str, str]) -> list[Problem]:
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
    return problems


def shard_problems(storage: Storage, plan: Plan, column: str, column_hash: str, shard: int) -> Iterator[str]:
    """What is wrong with one committed shard, in words."""
    try:
        commit = read_commit(storage, column, shard)
        if commit.plan_hash != plan.plan_hash or commit.column_hash != column_hash:
            yield "its commit belongs to another plan or field setting"
        if wrong := other_rows(commit, plan.slice_rows):
            yield wrong
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
    tar = f"{column}/data/{commit.tar}"
    if (size := storage.size(tar)) != commit.tar_bytes:  # before it is fetched
        yield f"data/{commit.tar} has {size} bytes, not {commit.tar_bytes}"
        return
    with storage.local_copy(tar) as path:
        yield from _file_problems(path, commit, entries)


def _file_problems(path: Path, commit: Commit, entries: Entries) -> Iterator[str]:
    if (size := regular_size(path)) != commit.tar_bytes:
        yield f"data/{commit.tar} has {size} bytes, not {commit.tar_bytes}"
        return
    with open_plain(path) as tar:
        digest = hashlib.file_digest(tar, "sha256")
    if digest.hexdigest() != commit.tar_sha256:
        yield f"data/{commit.tar} does not have its checksum"
        return
    promised = [
        (f"{entry.key}.{member.ext}", member.offset, member.size) for entry in entries for member in entry.members
    ]
    with open_plain(path) as opened:
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


def lost(storage: Storage, plan: Plan, column: str, column_hash: str = "") -> dict[int, str]:
    """Committed shards of a column of which a file is not there, or not as long as it was: shard → what, in words.

    By listings and sizes: nothing is hashed, and of a store nothing is read but commits.

    Args:
        column_hash: that commits must be bound to; "": any.

    Raises:
        CacheError: a commit is damaged, or none of this plan and field.
    """
    shards = committed_shards(storage, column)
    commits = read_commits(storage, column, shards)
    tars = storage.sizes(f"{column}/data", {commit.tar for commit in commits})
    indices = storage.sizes(f"{column}/index", {commit.index for commit in commits})
    found: dict[int, str] = {}
    for commit in commits:
        if (
            commit.plan_hash != plan.plan_hash
            or other_rows(commit, plan.slice_rows)
            or (column_hash and commit.column_hash != column_hash)
        ):
            raise CacheError(
                f"{storage}: shard {commit.shard:06d} of {column} was made by another plan or field setting: run `kdcli cache verify`"
            )
        tar, index = f"data/{commit.tar}", f"index/{commit.index}"
        if commit.tar not in tars:
            found[commit.shard] = f"{column}/{tar} is missing"
        elif tars[commit.tar] != commit.tar_bytes:
            found[commit.shard] = f"{column}/{tar} has {tars[commit.tar]} bytes, not {commit.tar_bytes}"
        elif commit.index not in indices:
            found[commit.shard] = f"{column}/{index} is missing"
        elif not _ends_as_parquet(storage, f"{column}/{index}", indices[commit.index]):
            found[commit.shard] = f"{column}/{index} is cut off"
    return found


def _ends_as_parquet(storage: Storage, path: str, size: int) -> bool:
    if size < 2 * len(PARQUET) or not storage.local:
        return size >= 2 * len(PARQUET)
    with storage.open(path) as opened:
        opened.seek(size - len(PARQUET))
        return opened.read() == PARQUET


def orphans(storage: Storage, columns: dict[str, str]) -> list[str]:
    """Files of kdcli's own names that no commit names: left by killed or second writers, safe to remove while nothing writes."""
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
    return [path for path in found if OWN.fullmatch(path)]
