"""THE line: for each batch of a slice, prepare it, ask the teacher, encode each field, write; then commit."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from teacher_cache.capturing.behind import Behind, Record, Waits, encode_row
from teacher_cache.capturing.capture_job import CaptureJob, SampleReader
from teacher_cache.capturing.window_bytes import WINDOW_BYTES, Weigh, input_bytes, weigher
from teacher_cache.codecs import container
from teacher_cache.errors import CacheError, OutOfMemory, SkipSample, one_line, out_of_memory
from teacher_cache.fields import Field, wants_of
from teacher_cache.planning.same_samples import NOTHING, RecordedSamples
from teacher_cache.preparing.batch import token_batches
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Prepared, Sample, SkipRecord, TeacherOutput
from teacher_cache.samples import cut_counts, encode_sample
from teacher_cache.shards.writer import ShardWriter
from teacher_cache.sources import DataSpec
from teacher_cache.wants import Wants

WINDOW_ROWS = 256
Teacher = Callable[[Sequence[Prepared], Wants], list[TeacherOutput]]


@dataclass
class Window:
    """Consecutive rows of a slice on their way: usable ones prepared, the others as skip records."""

    samples: list[Sample] = field(default_factory=list)
    prepared: list[Prepared] = field(default_factory=list)
    skipped: list[SkipRecord] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples) + len(self.skipped)

    def drop_pixels(self, indices: Sequence[int]) -> None:
        """Of rows that the teacher has seen: nothing that is written needs them."""
        for i in indices:
            self.prepared[i] = replace(self.prepared[i], pixels={}, images=())


def cache_shard(
    job: CaptureJob,
    shard: int,
    columns: Sequence[str],
    source: SampleReader,
    preparer: Preparer,
    teacher: Teacher | None,
    advance: Callable[[int], None] = lambda rows: None,
    waits: Waits | None = None,
) -> None:
    """Write and commit the given columns of one shard.

    Args:
        teacher: may be None where only ``samples`` is missing. advance: told how many rows it has seen, and ``waits`` how long it waited.
    """
    recorded = RecordedSamples.of(job.storage, job.plan.plan_hash, shard, columns, own=job.keep_rows)
    hashes = {column: job.fields.get(column.removeprefix("fields/"), "") for column in columns}
    writers = {c: job.writer(job.storage, c, shard, job.plan.plan_hash, hashes[c], job.staging_bytes) for c in columns}
    fields = {c: job.field_objects[c.removeprefix("fields/")] for c in columns if c != "samples"}
    wants = wants_of(fields.values())
    try:
        with naming_shard(job, shard), Behind(job.encode_workers, waits) as behind:
            weigh = weigher(wants, teacher, preparer.config)
            for window in read_ahead(prepare_windows(job, shard, source, preparer, recorded, weigh)):
                records: deque[Future[Record]] = deque()
                if fields and teacher is not None:
                    said = answers(teacher, window.prepared, wants, job.batch_tokens, window.drop_pixels)
                    records = encode_window(window, said, fields, weigh, behind)
                window.drop_pixels(range(len(window.prepared)))  # also where there is no teacher
                behind.write(records, write_window, window, fields, writers)
                advance(len(window))
        commit_all(writers)
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise


def commit_all(writers: Mapping[str, ShardWriter]) -> None:
    """``samples`` first; CacheError where another worker was faster with other rows: what is written here belongs to none of them."""
    for column, writer in writers.items():
        standing = writer.commit()
        if column == "samples" and standing.tar_sha256 != writer.tar_sha256:
            raise CacheError(
                f"{writer.storage}: shard {writer.shard:06d} was captured meanwhile by another worker, with other rows or images than here "
                f"({standing.tar} there): every worker must read the same data and --image-root"
            )


def prepare_windows(
    job: CaptureJob,
    shard: int,
    source: SampleReader,
    preparer: Preparer,
    recorded: RecordedSamples = NOTHING,
    weigh: Weigh = input_bytes,
) -> Iterator[Window]:
    """The rows of a slice, prepared, in windows: enough rows to batch similar lengths, at most ``WINDOW_ROWS`` and ``WINDOW_BYTES``.

    Args:
        weigh: bytes that a row takes in memory until it is written. One that takes more than ``WINDOW_BYTES`` comes alone.
    """
    one = job.plan.slices[shard]
    window, size = Window(), 0
    for row in (row for group in one.groups for row in source.read(group)):
        found = prepare_row(row, job.plan.spec(one.part), preparer, recorded)
        own = 0 if isinstance(found, SkipRecord) else weigh(*found)
        if len(window) == WINDOW_ROWS or (window.samples and size + own > WINDOW_BYTES):
            yield window
            window, size = Window(), 0
        if isinstance(found, SkipRecord):
            window.skipped.append(found)
        else:
            window.samples.append(found[0])
            window.prepared.append(found[1])
        size += own
    if len(window):
        yield window


def prepare_row(
    row: Sample | SkipRecord, spec: DataSpec, preparer: Preparer, recorded: RecordedSamples
) -> tuple[Sample, Prepared] | SkipRecord:
    """The row with what it becomes, or why it is not used."""
    if isinstance(row, SkipRecord):
        return recorded.skipped(row)
    try:
        prepared = preparer.prepare(row, spec.template, spec.max_image_pixels)
    except SkipSample as skip:
        return recorded.skipped(skip_record(row, skip))
    return recorded.agree(row, prepared.key) or (row, prepared)


def ask(teacher: Teacher, prepared: Sequence[Prepared], wants: Wants, batch_tokens: int) -> list[TeacherOutput]:
    """What the teacher says of every row, in their order."""
    outputs = dict(answers(teacher, prepared, wants, batch_tokens))
    return [outputs[i] for i in range(len(prepared))]


def answers(
    teacher: Teacher,
    prepared: Sequence[Prepared],
    wants: Wants,
    batch_tokens: int,
    seen: Callable[[Sequence[int]], None] = lambda indices: None,
) -> Iterator[tuple[int, TeacherOutput]]:
    """(place, what the teacher says of that row) of every row, asked in batches of similar length. seen: told behind each of them."""
    for indices in token_batches(prepared, batch_tokens):
        with naming_batch([len(prepared[i]) for i in indices], batch_tokens):
            left = deque(zip(indices, teacher([prepared[i] for i in indices], wants)))
        seen(indices)
        while left:  # none of them is kept while the next batch is asked
            yield left.popleft()


def encode_window(
    window: Window,
    said: Iterator[tuple[int, TeacherOutput]],
    fields: Mapping[str, Field],
    weigh: Weigh,
    behind: Behind,
) -> deque[Future[Record]]:
    """Records to come of a window's usable rows, in their order: a row is encoded while the teacher works on the batches behind it."""
    records: dict[int, Future[Record]] = {}
    for i, output in said:
        row = window.samples[i], window.prepared[i]
        records[i] = behind.encode(weigh(*row), encode_row, *row, output, fields)
        del output
    return deque(records[i] for i in range(len(window.prepared)))


@contextmanager
def naming_batch(lengths: Sequence[int], batch_tokens: int) -> Iterator[None]:
    """OutOfMemory naming the batch that the teacher had no memory for. lengths: tokens of its rows."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        smaller = "--batch-tokens" if len(lengths) > 1 else "--max-length"
        raise OutOfMemory(
            f"out of memory with a batch of {len(lengths)} rows of up to {max(lengths):,} tokens ({_reason(error)}): give a smaller "
            f"{smaller} (--batch-tokens is {batch_tokens:,}), or use a machine with more memory"
        ) from None


@contextmanager
def naming_shard(job: CaptureJob, shard: int) -> Iterator[None]:
    """Around a shard: OutOfMemory that names it, whoever had too little: the teacher, an encoder, or what prepares rows."""
    try:
        yield
    except (MemoryError, RuntimeError, OutOfMemory) as error:
        if not isinstance(error, OutOfMemory) and not out_of_memory(error):
            raise
        said = (
            str(error)
            if isinstance(error, OutOfMemory)
            else f"out of memory ({_reason(error)}): give fewer --workers, fewer --encode-workers (they are {job.encode_workers}) or a "
            f"smaller --batch-tokens (it is {job.batch_tokens:,})"
        )
        raise OutOfMemory(
            f"{job.storage}: shard {shard:06d}: {said}; committed shards are kept, run the same command again to continue"
        ) from None


def _reason(error: BaseException) -> str:
    return one_line(error)[:160] or type(error).__name__


def write_window(
    records: deque[Future[Record]],
    window: Window,
    fields: Collection[str],
    writers: Mapping[str, ShardWriter],
) -> None:
    """Append a window to every column, in the slice's own order.

    Args:
        records: of its usable rows, taken out one by one; none where only ``samples`` is written. fields: columns of the others.
    """
    for record in window.skipped:
        for writer in writers.values():
            writer.skip(record)
    if "samples" in writers:
        for sample, prepared in zip(window.samples, window.prepared):
            members = encode_sample(sample, prepared)
            writers["samples"].add(prepared, members)
            writers["samples"].count(cut_counts(members, sample.place))
            writers["samples"].count(Counter(kind for kind, _ in sample.notes))
    for sample, prepared in zip(window.samples, window.prepared) if records else ():
        encoded = records[0].result()
        records.popleft()  # not before: a teacher that waits looks there for what is not encoded yet
        for column in fields:
            if encoded is None:
                skip = SkipSample("nonfinite_teacher", "NaN or infinity in the teacher's output")
                writers[column].skip(skip_record(sample, skip))
            else:
                writers[column].add(prepared, {container.EXTENSION: encoded[column]})
    for writer in writers.values():
        writer.check_staging()


def skip_record(sample: Sample, skip: SkipSample) -> SkipRecord:
    return SkipRecord(sample.part, sample.ordinal, sample.source_id, sample.place, skip.reason, skip.detail)


def read_ahead(windows: Iterator[Any]) -> Iterator[Any]:
    """Prepare the next window in a thread while the teacher works on this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
        waiting = pool.submit(next, windows, None)
        while (window := waiting.result()) is not None:
            waiting = pool.submit(next, windows, None)
            yield window
