"""The work of ``cache subset`` and ``cache merge``: descriptions bound to the new plan, then shard after shard, as many as are missing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from pipelines.capture.describe import HEAD
from pipelines.capture.executors import local
from teacher_cache.errors import CacheError
from teacher_cache.planning.derived import Choice, copy_shard
from teacher_cache.planning.plan import difference
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.verify import CALIBRATION_ROLES
from teacher_cache.shards.commit import await_listed, committed_shards
from teacher_cache.shards.sealed import seal, unseal
from teacher_cache.shards.storage import Storage
from teacher_cache.shards.writer import ShardWriter


@dataclass(frozen=True)
class Copying:
    """One job; pickles to worker processes, where it is the task of a shard.

    Attributes:
        choices: one a shard of the new cache. hashes: field → hash of its new ``field.json``. covers: field → parts it has.
    """

    caches: Sequence[TeacherCache]
    storage: Storage
    plan_hash: str
    choices: Sequence[Choice]
    hashes: Mapping[str, str]
    covers: Mapping[str, frozenset[str]]

    def columns(self, shard: int) -> list[str]:
        part = self.choices[shard].part
        return ["samples", *(name for name in self.hashes if part in self.covers[name])]

    def missing(self) -> dict[int, list[str]]:
        """Shards with columns that are not committed, in order."""
        done = {name: set(committed_shards(self.storage, folder(name))) for name in ("samples", *self.hashes)}
        left = {
            shard: [column for column in self.columns(shard) if shard not in done[column]]
            for shard in range(len(self.choices))
        }
        return {shard: columns for shard, columns in left.items() if columns}

    def __call__(self, worker: int) -> Callable[[int], int]:
        left = self.missing()

        def task(shard: int) -> int:
            choice = self.choices[shard]
            for column in left.get(shard, []):
                # A fresh reader a shard: what it keeps of an index is let go with it.
                reader = self.caches[choice.cache].column(column)
                column_hash = self.hashes.get(column, "")
                copy_shard(
                    reader, choice, ShardWriter(self.storage, folder(column), shard, self.plan_hash, column_hash)
                )
            return shard

        return task


def folder(column: str) -> str:
    return column if column == "samples" else f"fields/{column}"


def copy_missing(job: Copying, workers: int, progress: Callable[[str, int, int], None]) -> None:
    """Copy what is not committed yet."""
    left = job.missing()
    rows = [len(choice.ordinals) for choice in job.choices]
    done = sum(rows) - sum(rows[shard] for shard in left)
    progress("start", done, sum(rows))
    with closing(local.run(job, sorted(left), max(1, min(workers, len(left))))) as copied:
        for shard in copied:
            done += rows[shard]
            progress("shard", done, sum(rows))
    await_listed(job.storage, {shard: map(folder, columns) for shard, columns in left.items()}, job.hashes)
    progress("end", sum(rows), sum(rows))


def copy_descriptions(cache: TeacherCache, storage: Storage, plan_hash: str, fields: Sequence[str]) -> dict[str, str]:
    """What reading needs of the teachers, then ``field.json`` of every field bound to the new plan. Returns field → its sha256."""
    copy_teachers(cache, storage, fields)
    hashes = {}
    for name in fields:
        path = f"fields/{name}/field.json"
        body = {key: value for key, value in cache.fields[name].items() if key != "sha256"} | {"plan_hash": plan_hash}
        data = seal(body)
        if not storage.put_new(path, data):
            there = unseal(storage.read(path), f"{storage}/{path}")
            if there != body:
                lines = "; ".join(difference(there, body))
                raise CacheError(f"{storage}: field {name} was copied from another one: {lines}: choose another --out")
        hashes[name] = hashlib.sha256(data).hexdigest()
    return hashes


def copy_teachers(cache: TeacherCache, target: Storage, fields: Sequence[str]) -> None:
    """Every file that these fields read of their teachers; the receipts, which say that the others are there, last.

    Only what a description or a receipt names is copied, and with the checksum that it names: nothing that somebody else put there, nor a
    link to it. Canaries stay behind: they speak of rows that the new cache may not have.

    Raises:
        CacheError: a file is missing or damaged.
    """
    named: dict[str, str] = {}
    receipts: dict[str, None] = {}
    for body in (cache.fields[name] for name in fields):
        folder = body["teacher_folder"]
        named |= {body[role]["path"]: body[role]["sha256"] for role in CALIBRATION_ROLES if body.get(role)}
        named |= {f"{folder}/processor/{one}": digest for one, digest in cache.processor_files(folder).items()}
        receipts[f"{folder}/processor.json"] = None
        if body["head_sha256"]:
            named[f"{folder}/{HEAD}"] = body["head_sha256"]
            receipts[f"{folder}/head.json"] = None
    for path, digest in {**named, **receipts}.items():
        if target.exists(path):
            continue
        try:
            data = cache.storage.read(path)
        except FileNotFoundError:
            raise CacheError(f"{cache.storage}/{path} is missing: `kdcli cache repair` it first") from None
        if digest is None:
            unseal(data, f"{cache.storage}/{path}")
        elif hashlib.sha256(data).hexdigest() != digest:
            raise CacheError(f"{cache.storage}/{path} does not have its checksum: `kdcli cache repair` it first")
        target.put_bytes(data, path)
