"""A lost ``manifest.json`` planned again, where commits prove that it is the plan that stood there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipelines.capture.cache_teacher import plan_for
from pipelines.capture.worker import CaptureRequest, make_preparer
from teacher_cache.errors import CacheError
from teacher_cache.planning.plan import Plan, content_hash
from teacher_cache.planning.same_samples import refuse_other_rows, with_pictures
from teacher_cache.preparing.fingerprint import PREPARATION
from teacher_cache.shards.commit import commit_path, committed_shards
from teacher_cache.shards.plain_files import StrangeFile
from teacher_cache.shards.storage import Storage


@dataclass(frozen=True)
class LoadedTeacher:
    """The teacher that the user named, without weights. ``folder``: where a cache keeps what reading needs of it."""

    processor: Any
    config: Any
    fingerprint: Mapping[str, Any]

    @property
    def folder(self) -> str:
        return f"teacher/{content_hash(dict(self.fingerprint))[:12]}"


def is_named(digest: str, documents: Iterable[bytes]) -> bool:
    """Whether a hash stands in one of these documents, damaged ones too; true where there is none to ask."""
    asked = False
    for data in documents:
        asked = True
        if digest.encode() in data:
            return True
    return not asked


def commits_of(storage: Storage, column: str) -> Iterator[bytes]:
    """Content of every commit; of one that cannot be read at all nothing, which names no hash."""
    for shard in committed_shards(storage, column):
        try:
            yield storage.read(commit_path(column, shard))
        except StrangeFile:
            yield b""


def restore_manifest(request: CaptureRequest, teacher: LoadedTeacher) -> Plan:
    """Plan again; CacheError where the commits are bound to another plan than these flags mean."""
    storage = Storage(request.out)
    columns = ["samples", *(f"fields/{name}" for name in storage.names("fields"))]
    plans = []
    for version in range(PREPARATION, 0, -1):  # the flags do not say which one captured
        preparer = make_preparer(replace(request, version=version), teacher.processor, teacher.config)
        plans.append(plan_for(request, storage, preparer, teacher.config))
        if is_named(plans[-1].plan_hash, (data for column in columns for data in commits_of(storage, column))):
            plan = with_pictures(plans[-1])
            refuse_other_rows(storage, plan)
            storage.put_bytes(plan.to_bytes(), "manifest.json")
            return plan
    raise CacheError(
        f"{storage}/manifest.json cannot be read, and its shards are of another plan than {plans[0].plan_hash[:12]}, which these flags "
        "mean: give teacher, data, --shards, --seed, --max-length and --over-length as in the capture"
    )
