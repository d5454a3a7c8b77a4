"""The commit of one shard of one column: written last, put-if-absent, names everything else by content.

A shard is done when its commit is there, readable and bound to the same plan and field; nothing else counts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from teacher_cache.errors import CacheError
from teacher_cache.records import SkipRecord
from teacher_cache.shards.plain_files import MOST_COMMIT
from teacher_cache.shards.schema import COUNT, require
from teacher_cache.shards.sealed import seal, unseal
from teacher_cache.shards.storage import Storage

FORMAT_VERSION = 1
MOST_COUNTS = 1000
LONGEST_LAG_S = 60.0
_COMMIT_NAME = re.compile(r"([0-9]{6}|[1-9][0-9]{6,9})\.json")
_FILE_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SKIP = {**dict.fromkeys(("part", "source_id", "place", "reason", "detail"), str), "ordinal": COUNT}
_SHAPE = {
    **dict.fromkeys(("plan_hash", "column_hash", "tar", "tar_sha256", "index", "index_sha256"), str),
    **dict.fromkeys(("shard", "tar_bytes", "rows", "written"), COUNT),
    "skipped": [_SKIP],
    "counts": {...: COUNT},
}


@dataclass(frozen=True)
class Commit:
    """What ``commits/000000.json`` holds.

    Attributes:
        shard: number of the slice; tar, index: file names under ``data/`` and ``index/``, both carry the tar's hash.
        plan_hash, column_hash: what the bytes were made from; the latter is empty for ``samples``.
        rows: rows of the slice; written + skipped = rows.
        skipped: rows that are not in the tar, with their reasons.
        counts: totals over the shard (``vision_rows``, ``response_rows``, ``text_tokens``); of ``samples`` also ``cut_rows`` and
            ``cut_images``, what ``over_length = "cut"`` cut and lost, and rows with each of ``errors.ROW_NOTES``, where there are any.
    """

    shard: int
    plan_hash: str
    column_hash: str
    tar: str
    tar_bytes: int
    tar_sha256: str
    index: str
    index_sha256: str
    rows: int
    written: int
    skipped: tuple[SkipRecord, ...]
    counts: dict[str, int]

    def to_bytes(self) -> bytes:
        """CacheError where nobody could read it again."""
        data = seal({"format_version": FORMAT_VERSION, **asdict(self)})
        if len(data) > MOST_COMMIT:
            raise CacheError(
                f"shard {self.shard:06d} skips {len(self.skipped):,} rows, more than a commit can hold: fix the mixture (`kdcli doctor`), "
                "or make the cache with more --shards"
            )
        return data


def parse_commit(data: bytes, place: str) -> Commit:
    """The commit in ``data``; CacheError naming ``place`` where it is damaged or of another format version."""
    try:
        body = unseal(data, place)
        version = body.pop("format_version")
        if version != FORMAT_VERSION:
            raise CacheError(f"{place}: format version {str(version)!r}; this kdcli reads {FORMAT_VERSION}")
        require(body, _SHAPE, place)
        body["skipped"] = tuple(SkipRecord(**skip) for skip in body["skipped"])
        commit = Commit(**body)
        _check(commit)
    except CacheError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CacheError(
            f"{place}: damaged commit ({type(error).__name__}: {error}): run `kdcli cache verify`"
        ) from None
    return commit


def read_commit(storage: Storage, column: str, shard: int) -> Commit:
    """The commit of a shard; CacheError where there is none or it is damaged."""
    relative = commit_path(column, shard)
    try:
        data = storage.read(relative)
    except FileNotFoundError:
        raise CacheError(
            f"{storage}: shard {shard:06d} of {column} is not committed: run `kdcli cache-teacher`"
        ) from None
    return _parse_of_shard(storage, column, shard, data)


def read_commits(storage: Storage, column: str, shards: Sequence[int]) -> list[Commit]:
    """``read_commit`` of several shards, asked for many at once."""
    try:
        every = storage.read_each([commit_path(column, shard) for shard in shards])
        return [_parse_of_shard(storage, column, shard, data) for shard, data in zip(shards, every)]
    except FileNotFoundError:
        return [read_commit(storage, column, shard) for shard in shards]  # one of them says which is missing


def commit_path(column: str, shard: int) -> str:
    return f"{column}/commits/{shard:06d}.json"


def _parse_of_shard(storage: Storage, column: str, shard: int, data: bytes) -> Commit:
    relative = commit_path(column, shard)
    commit = parse_commit(data, f"{storage}/{relative}")
    if commit.shard != shard:
        raise CacheError(f"{storage}/{relative}: says it is shard {commit.shard}: run `kdcli cache verify`")
    return commit


def committed_shards(storage: Storage, column: str) -> list[int]:
    """Numbers of the shards that have a commit file, sorted; one listing, nothing is opened."""
    found = (_COMMIT_NAME.fullmatch(name) for name in storage.names(f"{column}/commits"))
    return sorted(int(name[1]) for name in found if name)


def await_listed(storage: Storage, left: Mapping[int, Iterable[str]], fields: Iterable[str] = ()) -> None:
    """Behind a run: wait until listings show what it wrote, where those of an object store lag. A cache is opened by its listings.

    Args:
        left: shard → columns that the run was to write; what it did not write is not waited for. fields: that it described.

    Raises:
        CacheError: the store does not list in ``LONGEST_LAG_S`` what it holds.
    """
    wanted: dict[str, set[int]] = {f"fields/{name}": set() for name in fields}
    for shard, columns in left.items():
        for column in columns:
            wanted.setdefault(column, set()).add(shard)
    started = time.monotonic()
    while hidden := next(_hidden(storage, wanted), None) if not storage.local else None:
        if time.monotonic() - started > LONGEST_LAG_S:
            raise CacheError(
                f"{storage}/{hidden} exists, but its store has not listed it for {LONGEST_LAG_S:.0f} seconds: the cache is "
                "complete; run the command again when `kdcli cache status` counts it"
            )
        time.sleep(0.5)


def _hidden(storage: Storage, wanted: Mapping[str, Iterable[int]]) -> Iterator[str]:
    """Files of these columns that can be read and are not listed."""
    described = storage.names("fields")
    for column, shards in wanted.items():
        unseen = [commit_path(column, shard) for shard in sorted(set(shards) - set(committed_shards(storage, column)))]
        if column.startswith("fields/") and column.removeprefix("fields/") not in described:
            unseen.append(f"{column}/field.json")
        yield from filter(storage.exists, unseen)


def _check(commit: Commit) -> None:
    for name in (commit.tar, commit.index):
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"{name[:60]!r} is not the name of a tar or index")
    if len(commit.counts) > MOST_COUNTS:
        raise ValueError(f"{len(commit.counts):,} totals, at most {MOST_COUNTS:,} are read")
    for digest in (commit.tar_sha256, commit.index_sha256):  # a local cache names files by the first
        if not _SHA256.fullmatch(digest):
            raise ValueError(f"{digest[:70]!r} is not a sha256")
    if commit.rows != commit.written + len(commit.skipped):
        raise ValueError(f"{commit.rows} rows are not {commit.written} written + {len(commit.skipped)} skipped")
    if len({skip.ordinal for skip in commit.skipped}) != len(commit.skipped):
        raise ValueError("a row is skipped twice")
