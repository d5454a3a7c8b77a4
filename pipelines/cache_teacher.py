"""``kdcli cache-teacher``: plan, describe, capture every shard that is not committed yet, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from pipelines import finished
from pipelines.calibrate import calibrate, mixture_reader
from pipelines.describe import as_begun, describe, new_calibrated
from pipelines.executors import local, ray
from pipelines.heartbeat import Heartbeat, forget, new_run
from pipelines.inspect_cache import status
from pipelines.label_warnings import label_warnings
from pipelines.preflight import canaries
from pipelines.preflight.adopt import calibrations
from pipelines.profiles import chosen_fields, with_tails
from pipelines.settings import CaptureSettings
from pipelines.skipped_rows import excess, refuse_skips, take_in_again
from student_train.cache import Cache
from teacher_cache import stopping
from teacher_cache.cache_shard import CaptureJob, RowReader, Teacher, cache_shard
from teacher_cache.errors import KdcliError, naming_full_disk
from teacher_cache.fields import CalibratedField, Field, create_field
from teacher_cache.fields.calibration import Calibration
from teacher_cache.fingerprint import PREPARATION, preparation_version
from teacher_cache.layout import typical_tokens
from teacher_cache.plan import Plan, content_hash, known_plan, make_plan, parts_with_images, read_plan, write_plan
from teacher_cache.prepare import Limits, Preparer
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.same_rows import bind_pictures, refuse_other_pictures
from teacher_cache.shards.reader import ColumnReader
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec
from teacher_cache.stopping import Stopped
from teacher_cache.stored_rows import StoredPreparer, StoredRows
from teacher_cache.teachers import null
from teacher_cache.teachers.backends import (
    linear_head,
    load_head,
    load_processor,
    open_teacher,
    refuse_wants,
    release,
    teacher_fingerprint,
)
from teacher_cache.teachers.text_vision import check_layers
from teacher_cache.teachers.transformers import TeacherSpec, resolve_device


@dataclass(frozen=True)
class CaptureRequest:
    """One capture as the user asked for it; pickles to worker processes.

    Attributes:
        from_samples: the rows come from the cache's own ``samples``, not from ``data``.
        part_of_shards: (i, n): only shards that leave the remainder i when divided by n, for a job that n others do beside it.
        prepare_only: plan, calibrate and describe, and leave all shards to others.
        version: of the preparation; that of the cache where there is one.
        retry_skipped: shards that skip rows which can be used now are made again.
        seen: sizes and times of the mixture's files from before they were hashed, as ``SteadyRows`` takes them.
    """

    teacher: TeacherSpec
    data: tuple[DataSpec, ...]
    out: str
    settings: CaptureSettings
    field_params: Mapping[str, Mapping[str, Any]]
    from_samples: bool = False
    part_of_shards: tuple[int, int] | None = None
    prepare_only: bool = False
    version: int = PREPARATION
    retry_skipped: bool = False
    seen: Mapping[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        number, count = self.part_of_shards or (0, 1)
        if not 0 <= number < count:
            raise KdcliError(f"--part-of-shards {number}/{count}: the number must be from 0 to {count - 1}")

    def mine(self, left: Mapping[int, list[str]]) -> dict[int, list[str]]:
        """Of these shards, those that this capture is to make."""
        number, count = self.part_of_shards or (0, 1)
        return {shard: columns for shard, columns in left.items() if shard % count == number and not self.prepare_only}


def capture(
    request: CaptureRequest,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    warn: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the whole job; continues what is there. ``progress(event, done_rows, all_rows)`` is called often, ``warn(line)`` before any
    GPU is touched, with what is among the ``notes`` too.

    Returns:
        ``inspect_cache.status`` of the finished cache: rows, skips by reason, bytes by column; ``notes`` where there are any; ``excess``
        where more rows of a part were skipped than ``allow_skips``: a line each, which a command ends with.

    Raises:
        KdcliError: before anything is written, where so many rows of a part cannot be used.
    """
    storage = Storage(request.out)
    wanted = chosen_fields(request.settings.store, request.settings.fields, request.field_params)
    fields = {name: create_field(name, params) for name, params in with_tails(wanted, request.teacher).items()}
    fields = as_begun(storage, fields, wanted)
    job = finished.Job(request.out, request.teacher, request.data, request.settings, fields)
    files = job.files()
    if not request.retry_skipped and job.is_finished(files):
        forget(storage)  # a run that was killed behind its last commit
        progress("end", *[sum(one.rows for one in read_plan(storage).slices)] * 2)
        return summary_of(request, fields, made_up(request, fields), complete=True)
    refuse_wants(request.teacher, wants_of(fields))
    processor, config = load_processor(request.teacher)
    parts = [spec.part for spec in request.data]
    if unknown := set(request.settings.parts_without_fields) - set(parts):
        raise KdcliError(
            f"parts_without_fields names {', '.join(sorted(unknown))}, but the parts are {', '.join(parts)}"
        )
    if known := known_plan(storage):  # what an older kdcli began is finished as it was begun
        request = replace(request, version=preparation_version(known.preparation, storage))
    preparer = make_preparer(request, processor, config)
    for template in sorted({spec.template for spec in request.data}):
        preparer.check_template(template)
    local.worker_count(request.settings.workers)
    resolve_device(request.teacher)
    fingerprint = teacher_fingerprint(request.teacher, processor, config)
    plan = plan_for(request, storage, preparer, config)
    for part in parts_with_images(plan.slices):
        preparer.check_images(part, plan.spec(part).template)
    if storage.exists("manifest.json"):
        write_plan(storage, plan)  # nothing is written: another plan is refused before its rows are looked at
    complete = not missing_of(request, storage, plan, fields)
    plan = bind_pictures(storage, plan, complete)
    if not complete or request.retry_skipped:
        refuse_skips(plan, preparer, request.settings.allow_skips)
    preflight, taken = adopted(request, storage, fields, fingerprint)
    warnings = [f"WARNING: {line}" for line in label_warnings(request.teacher, preparer, plan)]
    for line in warnings:
        warn(line)
    with naming_full_disk(storage):
        write_plan(storage, plan)  # the first write: what can be refused is refused above
    refuse_other_pictures(storage, read_plan(storage), plan, complete)  # another writer may have been first
    request = replace(request, seen=files)
    summary = capture_fields(request, plan, fields, fingerprint, (processor, config), (preflight, taken), progress)
    job.remember(files)
    return summary | ({"notes": [*warnings, *summary.get("notes", [])]} if warnings else {})


def capture_fields(
    request: CaptureRequest,
    plan: Plan,
    fields: Mapping[str, Field],
    fingerprint: dict[str, Any],
    loaded: tuple[Any, Any],
    adoption: tuple[Cache | None, Mapping[str, Calibration]],
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Describe the fields, then capture every shard that is not committed yet. Returns what ``capture`` does.

    Args:
        loaded: the teacher's (processor, config). adoption: as ``adopted`` found it.
    """
    check_layers(wants_of(fields), loaded[1], request.teacher.trust_remote_code)
    storage, (preflight, taken) = Storage(request.out), adoption
    with naming_full_disk(storage):
        hashes, bound = describe(
            storage,
            plan,
            fields,
            fingerprint,
            loaded[0],
            load_head=lambda: load_head(request.teacher, *loaded),
            calibrate=lambda new: taken or fit_fields(request, storage, plan, loaded, new),
        )
        job = CaptureJob(
            storage=storage,
            plan=plan,
            fields=hashes,
            field_objects=bound,
            parts_without_fields=frozenset(request.settings.parts_without_fields),
            batch_tokens=request.settings.batch_tokens,
            staging_bytes=int(request.settings.staging_gb * 1e9),
        )
        missing = job.missing()
        left = request.mine(missing)
        total = sum(one.rows for one in plan.slices)
        done = total - sum(plan.slices[shard].rows for shard in missing)
        progress("start", done, total)
        notes = ask_canaries(request, preflight, storage, fingerprint) if left and fields and preflight else []
        notes += made_up(request, fields)
        if left:
            run_shards(request, job, left, done, total, progress)
            missing = job.missing()
        if request.retry_skipped:
            notes += retry_skipped(request, job, loaded, progress)
        if not missing:
            forget(storage)  # of killed runs too: nobody works here any more
        progress("end", total - sum(plan.slices[shard].rows for shard in missing), total)
        return summary_of(request, fields, notes, complete=not missing)


def summary_of(
    request: CaptureRequest, fields: Mapping[str, Field], notes: list[str], complete: bool
) -> dict[str, Any]:
    """What ``capture`` returns. Skips are judged when all shards are there: of a job that several share, by the last."""
    cache = Cache(request.out)
    columns = ["samples", *(f"fields/{name}" for name in fields)]
    settings = request.settings  # a field that is added counts the teacher's skips alone: the others are its samples'
    much = excess(cache, columns, settings.allow_skips, of_teacher=request.from_samples) if complete else []
    much += ["the cache is kept; --retry-skipped takes rows in whose cause is gone"] if much else []
    return status(cache) | ({"notes": notes} if notes else {}) | ({"excess": much} if much else {})


def retry_skipped(
    request: CaptureRequest, job: CaptureJob, loaded: tuple[Any, Any], progress: Callable[[str, int, int], None]
) -> list[str]:
    """Take in rows that can be used now. Returns notes."""

    def run(job: CaptureJob, again: dict[int, list[str]]) -> None:
        total = sum(job.plan.slices[shard].rows for shard in again)
        progress("start", 0, total)
        run_shards(request, job, again, 0, total, progress)

    mine = request.mine({shard: [] for shard in range(len(job.plan.slices))})
    return take_in_again(
        job, list(mine), row_readers(request, job.storage, job.plan), make_preparer(request, *loaded), run
    )


def wants_of(fields: Mapping[str, Field]) -> frozenset[str]:
    """What these fields want of the teacher."""
    return frozenset().union(*(one.wants for one in fields.values()))


def made_up(request: CaptureRequest, fields: Mapping[str, Field]) -> list[str]:
    """The note on a teacher that says nothing."""
    return [null.NOTE] if fields and request.teacher.id.startswith(null.PREFIX) else []


def adopted(
    request: CaptureRequest, storage: Storage, fields: Mapping[str, Field], fingerprint: Mapping[str, Any]
) -> tuple[Cache | None, dict[str, Calibration]]:
    """(the preflight's cache where one is named, calibrations out of it for the fields that the job's cache lacks)."""
    if not request.settings.calibration:
        return None, {}
    preflight = Cache(request.settings.calibration)
    return preflight, calibrations(preflight, new_calibrated(storage, fields), fingerprint)


def make_preparer(request: CaptureRequest, processor: Any, config: Any) -> Preparer:
    kind = StoredPreparer if request.from_samples else Preparer
    return kind(processor, config, Limits(request.settings.max_length, request.settings.over_length), request.version)


def plan_for(request: CaptureRequest, storage: Storage, preparer: Preparer, config: Any) -> Plan:
    """The plan that these flags mean: a changed mixture, template or tokenizer does not pass for that of the cache that is there."""
    settings, known = request.settings, known_plan(storage)
    tokens = typical_tokens(config, preparer.processor)
    return make_plan(request.data, settings.shards, preparer.fingerprint(), settings.seed, tokens, known)


def missing_of(
    request: CaptureRequest, storage: Storage, plan: Plan, fields: Mapping[str, Field]
) -> dict[int, list[str]]:
    """Shards with columns that are not committed, before any field is described."""
    bare = frozenset(request.settings.parts_without_fields)
    return CaptureJob(storage, plan, dict.fromkeys(fields, ""), fields, bare).missing()


def fit_fields(
    request: CaptureRequest,
    storage: Storage,
    plan: Plan,
    loaded: tuple[Any, Any],
    fields: Mapping[str, CalibratedField],
) -> dict[str, Calibration]:
    """Calibrations of new fields by the teacher itself, which leaves the device again before workers start."""
    settings = request.settings
    teacher = open_teacher(request.teacher, *loaded)
    sketched = any(name.endswith("_hidden") for name in fields)
    return calibrate(
        fields,
        plan,
        make_preparer(request, *loaded),
        teacher,
        linear_head(teacher) if sketched else teacher.head,
        settings.calibration_rows,
        settings.batch_tokens,
        frozenset(settings.parts_without_fields),
        row_readers(request, storage, plan),
    )


def ask_canaries(request: CaptureRequest, preflight: Cache, storage: Storage, fingerprint: dict[str, Any]) -> list[str]:
    """Notes; CompatibilityError where this machine's teacher is not the preflight's. It leaves the device before workers start."""
    folder = f"teacher/{content_hash(fingerprint)[:12]}"
    processor, config = load_processor(request.teacher)
    load = partial(open_teacher, request.teacher, processor, config)
    note = canaries.check(preflight, folder, processor, config, load)
    canaries.copy(preflight.storage, storage, folder)
    return [note]


def row_readers(request: CaptureRequest, storage: Storage, plan: Plan) -> Callable[[int], RowReader]:
    """Shard → where its rows are read."""
    if request.from_samples:
        samples = ColumnReader(storage, "samples", plan.plan_hash, "")
        return lambda shard: StoredRows(samples, shard)
    return mixture_reader(plan, request.seen)


@dataclass(frozen=True)
class ShardTask:
    """Builds a worker's task: ``ShardTask(...)(worker number)`` loads the teacher once and returns ``task(shard)``."""

    request: CaptureRequest
    job: CaptureJob
    left: Mapping[int, list[str]]
    advance: Callable[[int], None] | None = None
    run: str = ""

    def __call__(self, worker: int) -> Callable[[int], int]:
        spec = self.request.teacher
        if spec.device == "auto" and torch.cuda.is_available():
            spec = replace(spec, device=f"cuda:{worker % torch.cuda.device_count()}")
        processor, config = load_processor(spec)
        preparer = make_preparer(self.request, processor, config)
        row_reader = row_readers(self.request, self.job.storage, self.job.plan)
        needs_teacher = any(column != "samples" for columns in self.left.values() for column in columns)
        teacher: Teacher | None = stoppable(open_teacher(spec, processor, config)) if needs_teacher else None

        heartbeat = Heartbeat(self.job.storage, self.run) if self.run else None

        def advance(rows: int) -> None:
            stopping.check()
            if heartbeat:
                heartbeat.advance(rows)
            if self.advance:
                self.advance(rows)

        def task(shard: int) -> int:
            with heartbeat.on(shard) if heartbeat else nullcontext(), stopping.held():
                cache_shard(self.job, shard, self.left[shard], row_reader(shard), preparer, teacher, advance)
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
    count = done

    def advance(rows: int) -> None:
        nonlocal count
        count += rows
        progress("rows", count, total)

    settings, run = request.settings, new_run()
    workers = min(local.worker_count(settings.workers), len(left))
    inline = workers == 1 and settings.executor != "ray"
    if not inline:
        release()
    task = ShardTask(request, job, left, advance if inline else None, run)
    if settings.executor == "ray":
        cluster = ray.Cluster(settings.ray_address, settings.gpus_per_worker, settings.cpus_per_worker)
        finished = ray.run(task, sorted(left), settings.workers, cluster)
    else:
        finished = local.run(task, sorted(left), workers)
    try:
        with closing(finished):
            for shard in finished:
                if not inline:
                    advance(job.plan.slices[shard].rows)
                progress("shard", count, total)
    except Stopped as stop:
        forget(job.storage, run)  # who ended in order is neither lost nor failed
        what = "what is committed stays, the shard that was begun is dropped: run the same command again to continue"
        raise Stopped(stop.number, what) from None
    forget(job.storage, run)


def stoppable(teacher: Teacher) -> Teacher:
    """The teacher; before each batch it looks for a signal to stop."""

    def ask(prepared: Sequence[Prepared], wants: frozenset[str]) -> list[TeacherOutput]:
        stopping.check()
        return teacher(prepared, wants)

    return ask
