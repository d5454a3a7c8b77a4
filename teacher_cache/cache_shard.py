"""THE line: for each batch of a slice, prepare it, ask the teacher, encode each field, write; then commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any, Protocol

import torch

from teacher_cache.batch import token_batches
from teacher_cache.codecs import container
from teacher_cache.errors import SkipRow
from teacher_cache.fields import Field
from teacher_cache.plan import Plan
from teacher_cache.prepare import Preparer
from teacher_cache.records import Prepared, RowGroup, Sample, SkipRecord, TeacherOutput
from teacher_cache.samples import encode_sample
from teacher_cache.shards.commit import committed_shards
from teacher_cache.shards.storage import Storage
from teacher_cache.shards.writer import ShardWriter

WINDOW_ROWS = 256
Teacher = Callable[[Sequence[Prepared], frozenset[str]], list[TeacherOutput]]


class RowReader(Protocol):
    """What capture asks of a mixture part (``sources.Source``), or of the ``samples`` of a cache (``stored_rows``)."""

    def read(self, group: RowGroup) -> Iterator[Sample | SkipRecord]:
        """The rows of one group in order, exactly ``group.rows`` items."""
        ...


@dataclass(frozen=True)
class CaptureJob:
    """What every worker needs to know, JSON- and pickle-able parts only.

    Attributes:
        fields: field → hash of its ``field.json``; the order is the writing order.
        parts_without_fields: parts of which only ``samples`` is stored (a projector phase without distillation).
        batch_tokens: padded tokens in one teacher batch.
        staging_bytes: as ``ShardWriter`` takes it.
        writer: of a shard that is new; or of one that is there, damaged (``shards/mender.py``).
    """

    storage: Storage
    plan: Plan
    fields: Mapping[str, str]
    field_objects: Mapping[str, Field]
    parts_without_fields: frozenset[str] = frozenset()
    batch_tokens: int = 8192
    staging_bytes: int = 0
    writer: type[ShardWriter] = ShardWriter

    def columns(self, shard: int) -> list[str]:
        """Columns of this shard, ``samples`` first."""
        bare = self.plan.slices[shard].part in self.parts_without_fields
        return ["samples"] + ([] if bare else [f"fields/{name}" for name in self.fields])

    def missing(self) -> dict[int, list[str]]:
        """Shards with columns that are not committed, in order."""
        every = ["samples", *(f"fields/{name}" for name in self.fields)]
        done = {column: set(committed_shards(self.storage, column)) for column in every}
        left = {
            shard: [column for column in self.columns(shard) if shard not in done[column]]
            for shard in range(len(self.plan.slices))
        }
        return {shard: columns for shard, columns in left.items() if columns}


@dataclass
class Window:
    """Consecutive rows of a slice on their way: usable ones prepared, the others as skip records."""

    samples: list[Sample] = field(default_factory=list)
    prepared: list[Prepared] = field(default_factory=list)
    skipped: list[SkipRecord] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples) + len(self.skipped)


def cache_shard(
    job: CaptureJob,
    shard: int,
    columns: Sequence[str],
    source: RowReader,
    preparer: Preparer,
    teacher: Teacher | None,
    advance: Callable[[int], None] = lambda rows: None,
) -> None:
    """Write and commit the given columns of one shard. ``teacher`` may be None where only ``samples`` is missing."""
    hashes = {column: job.fields.get(column.removeprefix("fields/"), "") for column in columns}
    writers = {c: job.writer(job.storage, c, shard, job.plan.plan_hash, hashes[c], job.staging_bytes) for c in columns}
    fields = {c: job.field_objects[c.removeprefix("fields/")] for c in columns if c != "samples"}
    wants = frozenset().union(*(one.wants for one in fields.values()))
    try:
        with WriteBehind() as behind:
            for window in read_ahead(prepare_windows(job, shard, source, preparer)):
                outputs = None
                if fields and teacher is not None:
                    outputs = ask(teacher, window.prepared, wants, job.batch_tokens)
                behind.submit(write_window, window, outputs, fields, writers)
                advance(len(window))
        for writer in writers.values():
            writer.commit()
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise


def prepare_windows(job: CaptureJob, shard: int, source: RowReader, preparer: Preparer) -> Iterator[Window]:
    """The rows of a slice, prepared, ``WINDOW_ROWS`` at a time: enough to batch similar lengths, bounded in memory."""
    one = job.plan.slices[shard]
    spec = job.plan.spec(one.part)
    rows = (row for group in one.groups for row in source.read(group))
    while batch := list(islice(rows, WINDOW_ROWS)):
        window = Window()
        for row in batch:
            if isinstance(row, SkipRecord):
                window.skipped.append(row)
                continue
            try:
                prepared = preparer.prepare(row, spec.template, spec.max_image_pixels)
            except SkipRow as skip:
                window.skipped.append(skip_record(row, skip))
            else:
                window.samples.append(row)
                window.prepared.append(prepared)
        yield window


def ask(
    teacher: Teacher, prepared: Sequence[Prepared], wants: frozenset[str], batch_tokens: int
) -> list[TeacherOutput]:
    """What the teacher says of every row, in their order, asked in batches of similar length."""
    outputs: dict[int, TeacherOutput] = {}
    for indices in token_batches(prepared, batch_tokens):
        outputs.update(zip(indices, teacher([prepared[i] for i in indices], wants)))
    return [outputs[i] for i in range(len(prepared))]


def write_window(
    window: Window,
    outputs: Sequence[TeacherOutput] | None,
    fields: Mapping[str, Field],
    writers: Mapping[str, ShardWriter],
) -> None:
    """Append a window to every column, in the slice's own order; ``outputs`` None: only ``samples`` is written."""
    for record in window.skipped:
        for writer in writers.values():
            writer.skip(record)
    if "samples" in writers:
        for sample, prepared in zip(window.samples, window.prepared):
            writers["samples"].add(prepared, encode_sample(sample, prepared))
            for kind, _ in sample.notes:
                writers["samples"].note(kind)
    with beside_the_teacher(outputs[0].device if outputs else None):
        for sample, prepared, output in zip(window.samples, window.prepared, outputs or ()):
            if not is_finite(output):
                skip = SkipRow("nonfinite_teacher", "NaN or infinity in the teacher's output")
                for column in fields:
                    writers[column].skip(skip_record(sample, skip))
                continue
            for column, one in fields.items():
                writers[column].add(prepared, {container.EXTENSION: container.pack(one.encode(prepared, output))})
    for writer in writers.values():
        writer.check_staging()


def beside_the_teacher(device: torch.device | None) -> AbstractContextManager[Any]:
    """What is computed in this context does not queue behind the batch that the teacher is at: a stream of its own on a GPU."""
    if device is None or device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(_side_stream(device))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def skip_record(sample: Sample, skip: SkipRow) -> SkipRecord:
    return SkipRecord(sample.part, sample.ordinal, sample.source_id, sample.place, skip.reason, skip.detail)


def is_finite(output: TeacherOutput) -> bool:
    """False where anything that the teacher said is NaN or infinite (an empty tail, -inf, is no defect)."""
    heads = [column for head in output.topk.values() for column in (head.log_probs, head.log_z)]
    samples = [column for one in output.sampled.values() for column in (one.weights, one.entropy)]
    tensors = [*output.hidden.values(), *output.attention.values(), *heads, *samples]
    tensors += [one for one in (output.gram, output.features) if one is not None]
    return all(_all_finite(tensor) for tensor in tensors)


def _all_finite(tensor: torch.Tensor) -> bool:
    """NaN and infinity survive a sum, which is one pass without a mask; a sum that merely overflows is looked at again."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def read_ahead(windows: Iterator[Any]) -> Iterator[Any]:
    """Prepare the next window in a thread while the teacher works on this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
        waiting = pool.submit(next, windows, None)
        while (window := waiting.result()) is not None:
            waiting = pool.submit(next, windows, None)
            yield window


class WriteBehind:
    """Runs one job at a time in a thread, so that encoding, hashing and disks do not keep the teacher waiting.

    ``submit`` first waits for the job before, and raises what it raised; leaving the block without an error does the same.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._last: Future[Any] | None = None

    def submit(self, job: Callable[..., Any], *arguments: Any) -> None:
        self._wait()
        self._last = self._pool.submit(job, *arguments)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self._wait()
