"""``kdcli cache-teacher``: plan, describe, capture every shard that is not committed yet, report."""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipelines.executors import local
from pipelines.settings import CaptureSettings
from teacher_cache.cache_shard import CaptureJob, Teacher, cache_shard
from teacher_cache.codecs import container
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields import Field, create_field
from teacher_cache.plan import Plan, content_hash, difference, make_plan, read_plan, write_plan
from teacher_cache.prepare import Limits, Preparer
from teacher_cache.shards.commit import read_commit
from teacher_cache.shards.sealed import seal, unseal
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec, open_source
from teacher_cache.teachers.transformers import (
    TeacherSpec,
    TransformersTeacher,
    load_processor,
    resolve_device,
    teacher_fingerprint,
)

HEAD = "head.safetensors"


@dataclass(frozen=True)
class CaptureRequest:
    """One capture as the user asked for it; pickles to worker processes."""

    teacher: TeacherSpec
    data: tuple[DataSpec, ...]
    out: str
    settings: CaptureSettings
    field_params: Mapping[str, Mapping[str, Any]]


def capture(request: CaptureRequest, progress: Callable[[str, int, int], None] = lambda *_: None) -> dict[str, Any]:
    """Run the whole job; continues what is there. ``progress(event, done_rows, all_rows)`` is called often.

    Returns:
        The summary of ``summarise`` (rows, skips by reason, bytes by column).
    """
    storage = Storage(request.out)
    processor, config = load_processor(request.teacher)
    fields = {n: create_field(n, request.field_params.get(n)) for n in request.settings.fields}
    unknown = set(request.field_params) - set(fields)
    if unknown:
        raise KdcliError(
            f"parameters for {', '.join(sorted(unknown))}, but these fields are not captured: add them to --fields"
        )
    parts = [spec.part for spec in request.data]
    if unknown := set(request.settings.parts_without_fields) - set(parts):
        raise KdcliError(
            f"parts_without_fields names {', '.join(sorted(unknown))}, but the parts are {', '.join(parts)}"
        )
    preparer = make_preparer(request, processor, config)
    for template in sorted({spec.template for spec in request.data}):
        preparer.check_template(template)
    local.worker_count(request.settings.workers)
    resolve_device(request.teacher)
    fingerprint = teacher_fingerprint(request.teacher, processor, config)
    plan = plan_for(request, storage, preparer, config)
    write_plan(storage, plan)  # the first write: what can be refused is refused above
    job = describe(request, storage, plan, fields, fingerprint, processor)
    left = job.missing()
    total = sum(one.rows for one in plan.slices)
    done = total - sum(plan.slices[shard].rows for shard in left)
    progress("start", done, total)
    if left:
        run_shards(request, job, left, done, total, progress)
    progress("end", total, total)
    return summarise(storage)


def make_preparer(request: CaptureRequest, processor: Any, config: Any) -> Preparer:
    return Preparer(processor, config, Limits(request.settings.max_length, request.settings.over_length))


def plan_for(request: CaptureRequest, storage: Storage, preparer: Preparer, config: Any) -> Plan:
    """The plan that these flags mean, made afresh: a changed mixture, template or tokenizer must not pass for the old one."""
    vision = config.vision_config
    side = getattr(vision, "image_size", 336) // max(1, getattr(vision, "patch_size", 14)) if vision else 24
    return make_plan(
        request.data, request.settings.shards, preparer.fingerprint(), request.settings.seed, image_tokens=side * side
    )


def describe(
    request: CaptureRequest,
    storage: Storage,
    plan: Plan,
    fields: Mapping[str, Field],
    fingerprint: dict[str, Any],
    processor: Any,
) -> CaptureJob:
    """Write ``field.json`` of every field and the ``teacher/`` folder, or check that those there are the same."""
    folder = f"teacher/{content_hash(fingerprint)[:12]}"
    with_head = [name for name, one in fields.items() if any(want.startswith("hidden.") for want in one.wants)]
    bodies = {
        name: {
            "field": name,
            "version": one.version,
            "params": dict(one.params),
            "plan_hash": plan.plan_hash,
            "teacher": fingerprint,
            "teacher_folder": folder,
        }
        for name, one in fields.items()
    }
    for name, body in bodies.items():
        refuse_other_settings(storage, name, body)
    if fields:
        write_processor(storage, folder, processor)
    head_sha = write_head(request, storage, folder, processor) if with_head else None
    hashes = {}
    for name, body in bodies.items():
        data = seal({**body, "head_sha256": head_sha if name in with_head else None})
        if not storage.put_new(f"fields/{name}/field.json", data):
            refuse_other_settings(storage, name, body)
        hashes[name] = hashlib.sha256(storage.read(f"fields/{name}/field.json")).hexdigest()
    return CaptureJob(
        storage=storage,
        plan=plan,
        fields=hashes,
        field_objects=dict(fields),
        parts_without_fields=frozenset(request.settings.parts_without_fields),
        batch_tokens=request.settings.batch_tokens,
    )


def refuse_other_settings(storage: Storage, name: str, body: Mapping[str, Any]) -> None:
    """CacheError with a diff where the cache has this field with other settings or by another teacher."""
    path = f"fields/{name}/field.json"
    if not storage.exists(path):
        return
    there = unseal(storage.read(path), f"{storage}/{path}")
    there.pop("head_sha256", None)  # of the same weights, by their hash in the fingerprint
    if there != body:
        lines = "; ".join(difference(there, body))
        raise CacheError(f"{storage}: field {name} was made with other settings: {lines}: choose another --out")


def write_head(request: CaptureRequest, storage: Storage, folder: str, processor: Any) -> str:
    """The teacher's head W, for fields of hidden states. Returns its file's sha256; ``head.json`` says it is complete."""
    receipt = f"{folder}/head.json"
    if storage.exists(receipt):
        return unseal(storage.read(receipt), f"{storage}/{receipt}")["head_sha256"]
    teacher = TransformersTeacher(replace(request.teacher, device="cpu"), processor, None)
    data = container.pack({"weight": teacher.head.cpu()})
    digest = hashlib.sha256(data).hexdigest()
    put_bytes(storage, data, f"{folder}/{HEAD}")
    storage.put_new(receipt, seal({"head_sha256": digest}))
    return digest


def write_processor(storage: Storage, folder: str, processor: Any) -> None:
    """Tokenizer, chat template and image settings of the teacher; ``processor.json`` lists them when all are there."""
    receipt = f"{folder}/processor.json"
    if storage.exists(receipt):
        return
    with tempfile.TemporaryDirectory() as saved:
        processor.save_pretrained(saved)
        files = {file.name: file.read_bytes() for file in sorted(Path(saved).iterdir())}
    for name, data in files.items():
        put_bytes(storage, data, f"{folder}/processor/{name}")
    storage.put_new(receipt, seal({name: hashlib.sha256(data).hexdigest() for name, data in files.items()}))


def put_bytes(storage: Storage, data: bytes, relative: str) -> None:
    """A whole file, atomically; its draft has a name of its own, so that two captures may start at the same time."""
    draft = storage.staging() / f"{uuid.uuid4().hex}-{Path(relative).name}"
    draft.write_bytes(data)
    storage.put_file(draft, relative)


@dataclass(frozen=True)
class ShardTask:
    """Builds a worker's task: ``ShardTask(...)(worker number)`` loads the teacher once and returns ``task(shard)``."""

    request: CaptureRequest
    job: CaptureJob
    left: Mapping[int, list[str]]
    advance: Callable[[int], None] | None = None

    def __call__(self, worker: int) -> Callable[[int], int]:
        spec = self.request.teacher
        if spec.device == "auto" and torch.cuda.is_available():
            spec = replace(spec, device=f"cuda:{worker % torch.cuda.device_count()}")
        processor, config = load_processor(spec)
        preparer = make_preparer(self.request, processor, config)
        sources = {part.spec.part: open_source(part.spec) for part in self.job.plan.parts}
        needs_teacher = any(column != "samples" for columns in self.left.values() for column in columns)
        teacher: Teacher | None = TransformersTeacher(spec, processor, config) if needs_teacher else None

        def task(shard: int) -> int:
            source = sources[self.job.plan.slices[shard].part]
            advance = self.advance or (lambda rows: None)
            cache_shard(self.job, shard, self.left[shard], source, preparer, teacher, advance)
            return shard

        return task


def run_shards(
    request: CaptureRequest,
    job: CaptureJob,
    left: Mapping[int, list[str]],
    done: int,
    total: int,
    progress: Callable[[str, int, int], None],
) -> None:
    workers = min(local.worker_count(request.settings.workers), len(left))
    count = done

    def advance(rows: int) -> None:
        nonlocal count
        count += rows
        progress("rows", count, total)

    inline = workers == 1
    task = ShardTask(request, job, left, advance if inline else None)
    for shard in local.run(task, sorted(left), workers):
        if not inline:
            advance(job.plan.slices[shard].rows)
        progress("shard", count, total)


def cache_columns(storage: Storage) -> list[str]:
    """``samples`` and every field folder that describes itself."""
    return ["samples", *(f"fields/{n}" for n in storage.names("fields") if storage.exists(f"fields/{n}/field.json"))]


def summarise(storage: Storage) -> dict[str, Any]:
    """Rows, skips by reason, and bytes and tokens by column of what is committed so far."""
    from teacher_cache.shards.commit import committed_shards

    plan = read_plan(storage)
    columns: dict[str, Any] = {}
    for column in cache_columns(storage):
        commits = [read_commit(storage, column, shard) for shard in committed_shards(storage, column)]
        columns[column] = {
            "shards": len(commits),
            "rows": sum(one.rows for one in commits),
            "written": sum(one.written for one in commits),
            "skipped": dict(Counter(skip.reason for one in commits for skip in one.skipped)),
            "bytes": sum(one.tar_bytes for one in commits),
            "counts": dict(sum((Counter(one.counts) for one in commits), Counter())),
        }
    return {
        "plan_hash": plan.plan_hash,
        "shards": len(plan.slices),
        "rows": sum(s.rows for s in plan.slices),
        "columns": columns,
    }
