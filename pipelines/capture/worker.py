"""What a worker of a capture does: its request, where its rows come from, and the shards, one after the other, until a signal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pipelines.capture.calibrate import mixture_reader
from pipelines.capture.executors import local, ray
from pipelines.capture.heartbeat import Heartbeat, forget, new_run
from pipelines.processes.cores import usable_cores
from pipelines.settings import CaptureSettings
from teacher_cache import stopping
from teacher_cache.capturing.behind import Waits
from teacher_cache.capturing.cache_shard import Teacher, cache_shard
from teacher_cache.capturing.capture_job import CaptureJob, SampleReader
from teacher_cache.errors import KdcliError
from teacher_cache.planning.plan import Plan
from teacher_cache.preparing.fingerprint import PREPARATION
from teacher_cache.preparing.prepare import Limits, Preparer
from teacher_cache.reading.stored_samples import StoredPreparer, StoredSamples
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.shards.reader import ColumnReader
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec
from teacher_cache.stopping import Stopped
from teacher_cache.teachers import null
from teacher_cache.teachers.backends import load_processor, open_teacher, release
from teacher_cache.teachers.transformers import TeacherSpec, resolve_device
from teacher_cache.wants import Wants

MOST_ENCODERS = 4
"""Threads that encode by default: a third of what they do holds the interpreter's lock, so that more of them gain little."""
MUCH_WAITING, LEAST_WAITING = 0.05, 10.0
"""Share of a capture's time, and seconds, from which on it is said that the teacher waited for encoding."""


@dataclass(frozen=True)
class CaptureRequest:
    """One capture as the user asked for it; pickles to worker processes.

    Attributes:
        from_samples: the rows come from the cache's own ``samples``, not from ``data``.
        part_of_shards: (i, n): only shards that leave the remainder i when divided by n, for a job that n others do beside it.
        prepare_only: plan, calibrate and describe, and leave all shards to others.
        version: of the preparation; that of the cache where there is one.
        retry_skipped: shards that skip rows which can be used now are made again.
        seen: sizes and times of the mixture's files from before they were hashed, as ``SteadySamples`` takes them.
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


def make_preparer(request: CaptureRequest, processor: Any, config: Any) -> Preparer:
    kind = StoredPreparer if request.from_samples else Preparer
    return kind(processor, config, Limits(request.settings.max_length, request.settings.over_length), request.version)


def sample_readers(request: CaptureRequest, storage: Storage, plan: Plan) -> Callable[[int], SampleReader]:
    """Shard → where its rows are read."""
    if request.from_samples:
        samples = ColumnReader(storage, "samples", plan.plan_hash, "", slice_rows=plan.slice_rows)
        return lambda shard: StoredSamples(samples, shard)
    return mixture_reader(plan, request.seen)


def encode_workers(settings: CaptureSettings, teacher: TeacherSpec, workers: int) -> int:
    """Threads that encode beside one teacher: as asked for; or one where the teacher computes on the same cores; or all but one of those
    that fall to its worker, up to ``MOST_ENCODERS``.

    Args:
        workers: of this machine.
    """
    if settings.encode_workers:
        return settings.encode_workers
    if resolve_device(teacher).type == "cpu" and not teacher.id.startswith(null.PREFIX):
        return 1
    cores = int(settings.cpus_per_worker) if settings.executor == "ray" else usable_cores() // workers
    return max(1, min(MOST_ENCODERS, cores - 1))  # one prepares rows, and starts what the teacher computes


@dataclass(frozen=True)
class Captured:
    """What a worker tells of a shard. seconds: that it took. waited: of these, the teacher's, for rows to be encoded."""

    shard: int
    seconds: float
    waited: float
    encode_workers: int


@dataclass(frozen=True)
class ShardTask:
    """Builds a worker's task: ``ShardTask(...)(worker number)`` loads the teacher once and returns ``task(shard)``.

    Attributes:
        workers: of this machine, which share its cores.
    """

    request: CaptureRequest
    job: CaptureJob
    left: Mapping[int, list[str]]
    advance: Callable[[int], None] | None = None
    run: str = ""
    workers: int = 1

    def __call__(self, worker: int) -> Callable[[int], Captured]:
        spec = self.request.teacher
        if spec.device == "auto" and torch.cuda.is_available():
            spec = replace(spec, device=f"cuda:{worker % torch.cuda.device_count()}")
        job = replace(self.job, encode_workers=encode_workers(self.request.settings, spec, self.workers))
        processor, config = load_processor(spec)
        preparer = make_preparer(self.request, processor, config)
        row_reader = sample_readers(self.request, job.storage, job.plan)
        needs_teacher = any(column != "samples" for columns in self.left.values() for column in columns)
        teacher: Teacher | None = stoppable(open_teacher(spec, processor, config)) if needs_teacher else None

        heartbeat = Heartbeat(job.storage, self.run) if self.run else None

        waits = Waits()

        def advance(rows: int) -> None:
            stopping.check()
            if heartbeat:
                heartbeat.advance(rows, waits.encoded)
            if self.advance:
                self.advance(rows)

        def task(shard: int) -> Captured:
            began, before = time.perf_counter(), waits.encoded
            with heartbeat.on(shard) if heartbeat else nullcontext(), stopping.held():
                cache_shard(job, shard, self.left[shard], row_reader(shard), preparer, teacher, advance, waits)
            return Captured(shard, time.perf_counter() - began, waits.encoded - before, job.encode_workers)

        return task


def run_shards(
    request: CaptureRequest,
    job: CaptureJob,
    left: Mapping[int, list[str]],
    done: int,
    total: int,
    progress: Callable[[str, int, int], None],
) -> list[str]:
    """Make these shards. Returns notes: how long teachers waited for encoding, where that is much."""
    count, every = done, list[Captured]()

    def advance(rows: int) -> None:
        nonlocal count
        count += rows
        progress("waiting" if waiting(every) else "rows", count, total)

    settings, run = request.settings, new_run()
    workers = min(local.worker_count(settings.workers), len(left))
    inline = workers == 1 and settings.executor != "ray"
    if not inline:
        release()
    task = ShardTask(request, job, left, advance if inline else None, run, workers)
    if settings.executor == "ray":
        cluster = ray.Cluster(settings.ray_address, settings.gpus_per_worker, settings.cpus_per_worker)
        finished = ray.run(task, sorted(left), settings.workers, cluster)
    else:
        finished = local.run(task, sorted(left), workers)
    try:
        with closing(finished):
            for one in finished:
                every.append(one)
                if not inline:
                    advance(job.plan.slices[one.shard].rows)
                progress("waiting" if waiting(every) else "shard", count, total)
    except Stopped as stop:
        forget(job.storage, run)  # who ended in order is neither lost nor failed
        what = "committed shards are kept, the unfinished shard is dropped: run the same command again to continue"
        raise Stopped(stop.number, what) from None
    forget(job.storage, run)
    return [said] if (said := waiting(every)) else []


def waiting(every: Sequence[Captured]) -> str:
    """What is to be said of teachers that waited for encoding; "" where they did so little."""
    waited, seconds = sum(one.waited for one in every), sum(one.seconds for one in every)
    if waited < max(LEAST_WAITING, MUCH_WAITING * seconds):
        return ""
    used = max(one.encode_workers for one in every)
    return (
        f"the teacher waited {waited / seconds:.0%} of the time for rows to be encoded, by {used} thread{'s' * (used != 1)} a worker: "
        "raise --encode-workers if there are more cores, or use --store compact or exact, which encode less"
    )


def stoppable(teacher: Teacher) -> Teacher:
    """The teacher; before each batch it looks for a signal to stop."""

    def ask(prepared: Sequence[Prepared], wants: Wants) -> list[TeacherOutput]:
        stopping.check()
        return teacher(prepared, wants)

    return ask
