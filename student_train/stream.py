"""shards → order → batches. The order is a pure function of (seed, position): state to resume from is two integers.

Shards are shuffled, then rows inside blocks of ``BLOCK_SHARDS`` shards, so that storage is read nearly sequentially and every
batch still mixes many shards. Position p counts samples over all epochs; any number of processes shares one order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing import resource_tracker
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from student_train.packed import Packed, pack, unpack
from student_train.row_columns import Column, Weight
from teacher_cache.batch import Batch, collate
from teacher_cache.cached_samples import CachedSample, CachedSamples
from teacher_cache.errors import CompatibilityError, KdcliError, SkipRow, one_line
from teacher_cache.known_text import KnownText
from teacher_cache.parent import end_with_parent
from teacher_cache.prepare import Preparer
from teacher_cache.records import ImageLayout, Prepared, TextTokens

BLOCK_SHARDS = 16
FIXES = {"unknown_token": "resize_token_embeddings and save it, or use its own tokenizer"}
"""By skip reason, where it is not the usual one."""
OF_THE_PROCESSOR = ("processor_refused", "image_too_large", "images_unread")
"""Reasons to skip a captured row that are the student's own: its processor's, not the run's template or lengths."""
MOST_REFUSED = 64
"""Rows one after the other: a student that refuses so many refuses its data."""
CheckLayouts = Callable[[str, tuple[ImageLayout, ...], tuple[ImageLayout, ...]], None]


class Positions(Protocol):
    """Position → (shard index, row), and the blocks of shards that are read together.

    rows: of all shards. ``at`` of a position beyond them begins again.
    """

    rows: int

    def at(self, position: int) -> tuple[int, int]: ...

    def block_of(self, position: int) -> tuple[int, int]: ...

    def shards_of(self, epoch: int, block: int) -> list[int]: ...


class InPlace:
    """Positions as the rows lie in the cache: what is asked for row by row. Nothing is fetched ahead."""

    def __init__(self, counts: Sequence[int]):
        self._ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        self.rows = int(self._ends[-1]) if len(self._ends) else 0

    def at(self, position: int) -> tuple[int, int]:
        position %= self.rows
        shard = int(np.searchsorted(self._ends, position, side="right"))
        return shard, position - (int(self._ends[shard - 1]) if shard else 0)

    def block_of(self, position: int) -> tuple[int, int]:
        return 0, 0

    def shards_of(self, epoch: int, block: int) -> list[int]:
        return []


class Order:
    """Position → (shard index, row), for shards with ``counts`` rows each."""

    def __init__(self, counts: Sequence[int], seed: int):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.seed = seed
        self.rows = int(self.counts.sum())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._block = lru_cache(maxsize=4)(self._make_block)

    def __getstate__(self) -> dict[str, Any]:
        return {"counts": self.counts, "seed": self.seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in this epoch's order, and where each block of them begins (with the end appended)."""
        shards = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.counts))
        ends = np.cumsum(self.counts[shards])
        starts = np.concatenate([[0], ends[BLOCK_SHARDS - 1 :: BLOCK_SHARDS]])
        return shards, starts if starts[-1] == self.rows else np.append(starts, self.rows)

    def _make_block(self, epoch: int, block: int) -> np.ndarray:
        """``[rows of the block, 2]``: (shard index, row), shuffled."""
        members = self._epoch(epoch)[0][block * BLOCK_SHARDS : (block + 1) * BLOCK_SHARDS]
        pairs = np.concatenate(
            [np.stack([np.full(self.counts[s], s), np.arange(self.counts[s])], axis=1) for s in members]
        )
        return pairs[np.random.default_rng([self.seed, epoch, 1, block]).permutation(len(pairs))]

    def block_of(self, position: int) -> tuple[int, int]:
        """(epoch, number of the block in it) that a position lies in."""
        epoch, offset = divmod(position, self.rows)
        return epoch, int(np.searchsorted(self._epoch(epoch)[1], offset, side="right")) - 1

    def shards_of(self, epoch: int, block: int) -> list[int]:
        """Shard indices of a block; of the next epoch's first one where ``block`` is one too many."""
        shards, starts = self._epoch(epoch)
        if block == len(starts) - 1:
            return self.shards_of(epoch + 1, 0)
        return shards[block * BLOCK_SHARDS : (block + 1) * BLOCK_SHARDS].tolist()

    def at(self, position: int) -> tuple[int, int]:
        epoch, block = self.block_of(position)
        start = epoch * self.rows + self._epoch(epoch)[1][block]
        shard, row = self._block(epoch, block)[position - start]
        return int(shard), int(row)


@dataclass(frozen=True)
class TrainRow:
    """One row as the student reads it, with the teacher's decoded fields."""

    prepared: Prepared
    text: TextTokens
    fields: dict[str, Any]
    layout: tuple[ImageLayout, ...] = ()
    filler: bool = False
    columns: Mapping[str, Weight] = field(default_factory=dict)


@dataclass(frozen=True)
class RefusedRow:
    """A row that the teacher's processor took and the student's does not. line: which one, and why."""

    line: str


@dataclass(frozen=True)
class TrainBatch:
    """One micro-batch: the student's batch, and per field the decoded records of its samples in the same order.

    Attributes:
        text, layouts: of each sample as the teacher read it. student_text, student_layouts: as the student reads it.
        filler: it counts for nothing: this process has fewer samples in the step than another one, which it must keep pace with, or none
            that the student reads.
        refused: a line for every row that was left out, since the student's processor does not take it.
        columns: a weight a sample, by the ``Column`` that it is of.
    """

    batch: Batch
    text: tuple[TextTokens, ...]
    fields: dict[str, list[Any]]
    layouts: tuple[tuple[ImageLayout, ...], ...] = ()
    student_text: tuple[TextTokens, ...] = ()
    student_layouts: tuple[tuple[ImageLayout, ...], ...] = ()
    filler: bool = False
    refused: tuple[str, ...] = ()
    columns: Mapping[str, tuple[Weight, ...]] = field(default_factory=dict)


class TrainDataset(Dataset):
    """Positions of an ``Order`` → rows prepared for the student, checked against what the teacher read.

    Args:
        templates: part → template. image_limits: part → most pixels of an image. Both as the capture had them.
        same_grid: the vision layout must be the teacher's, token by token. The response token ids must be, where any field is read.
        check_layouts: further demand on (row key, teacher's layout, student's layout), a method's own.
        known_text: the student reads the stored tokens themselves, because its tokenizer and chat template are the teacher's.
        columns: numbers that every row comes with.

    A row that the student's processor refuses is left out (``RefusedRow``); where none of a micro-batch is left, the next row that can be
    read stands in, as a filler.
    """

    def __init__(
        self,
        rows: CachedSamples,
        order: Positions,
        preparer: Preparer,
        templates: dict[str, str],
        image_limits: dict[str, int],
        same_grid: bool,
        check_layouts: CheckLayouts | None = None,
        known_text: bool = False,
        columns: Sequence[Column] = (),
    ):
        self.columns = columns
        self.rows, self.order, self.preparer, self.templates = rows, order, preparer, templates
        self.image_limits, self.same_grid, self.check_layouts = image_limits, same_grid, check_layouts
        self.known = KnownText(preparer) if known_text else None
        self._block: tuple[int, int] | None = None

    def __getitem__(self, position: int) -> TrainRow:
        """The row there, or the next one that the student reads."""
        row = self.__getitems__([position])[-1]
        assert isinstance(row, TrainRow), "a micro-batch ends with a row"
        return row

    def __getitems__(self, positions: Sequence[int]) -> list[TrainRow | RefusedRow]:
        """A micro-batch at once: what a store is asked for its rows it is asked together."""
        rows = self.read(positions)
        if any(isinstance(row, TrainRow) for row in rows):
            return sorted(rows, key=lambda row: isinstance(row, TrainRow))
        for position in range(positions[-1] + 1, positions[-1] + MOST_REFUSED):
            (stand_in,) = self.read([position])
            if isinstance(stand_in, TrainRow):
                return [*rows, replace(stand_in, filler=True)]
        first = rows[0]
        assert isinstance(first, RefusedRow)
        raise CompatibilityError(f"{first.line}, nor any of the {MOST_REFUSED} rows after it: choose another student")

    def read(self, positions: Sequence[int]) -> list[TrainRow | RefusedRow]:
        """The rows at these positions; one that the student's processor refuses is a ``RefusedRow``."""
        if self.rows.remote and (block := self.order.block_of(positions[-1])) != self._block:
            epoch, number = self._block = block
            self.rows.expect(self.order.shards_of(epoch, number), self.order.shards_of(epoch, number + 1))
        return [self._prepare(row) for row in self.rows.read_many([self.order.at(one) for one in positions])]

    def _prepare(self, row: CachedSample) -> TrainRow | RefusedRow:
        try:
            asked = self.templates[row.sample.part], self.image_limits[row.sample.part]
            if self.known:
                prepared = self.known.prepare(row.sample, row.text, row.key, *asked)
            else:
                prepared = self.preparer.prepare(row.sample, *asked)
        except SkipRow as skip:
            if skip.reason in OF_THE_PROCESSOR:
                return RefusedRow(f"row {row.key} ({row.sample.place}): the student refuses it ({skip.detail})")
            raise CompatibilityError(
                f"row {row.key} ({row.sample.place}) was captured, but the student cannot read it ({skip}): "
                + FIXES.get(skip.reason, "give the student the capture's max_length and template")
            ) from None
        if row.fields:
            check_same_response(row.key, row.text, prepared.text)
            if self.same_grid:
                check_same_grid(row.key, row.layout, prepared.layout)
            if self.check_layouts:
                self.check_layouts(row.key, row.layout, prepared.layout)
        columns = {one.text: one.of(row) for one in self.columns}
        return TrainRow(prepared, row.text, row.fields, row.layout, columns=columns)


def check_same_response(key: str, teacher: TextTokens, student: TextTokens) -> None:
    """The teacher's rows belong to the student's response tokens only if these are equal, one by one."""
    if not torch.equal(teacher.response_ids, student.response_ids):
        theirs, ours = teacher.response_ids.tolist(), student.response_ids.tolist()
        at = next((i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b), min(len(theirs), len(ours)))
        raise CompatibilityError(
            f"row {key}: response token {at} is {theirs[at : at + 1]} for the teacher and {ours[at : at + 1]} for the student "
            f"({len(theirs)} and {len(ours)} tokens): the student needs the teacher's tokenizer and chat template"
        )


def check_same_grid(key: str, teacher: tuple[ImageLayout, ...], student: tuple[ImageLayout, ...]) -> None:
    """Row-aligned vision losses compare token i with token i: both sides must see the same views in the same grids."""

    def grids(layout: tuple[ImageLayout, ...]) -> list[list[tuple[int, int]]]:
        return [[view.grid for view in image.views] for image in layout]

    if grids(teacher) != grids(student):
        raise CompatibilityError(
            f"row {key}: vision grids differ, teacher {grids(teacher)}, student {grids(student)}: "
            "this method compares vision tokens one by one; use a student with the teacher's image size and patch size and no "
            "compressor, or method em-kd, which matches them"
        )


class MicroBatches:
    """Positions of every micro-batch of one process, step after step, from ``first_step`` on.

    Sample ``step·global_batch + i`` goes to process ``i mod world``; the last step of a run may be smaller. So a step has the same
    samples with any number of processes. All processes make the same number of micro-batches; where one has no sample left for its
    last, the step's first sample stands there as a filler.
    """

    def __init__(self, total: int, global_batch: int, micro_batch: int, rank: int, world: int, first_step: int):
        self.total, self.global_batch, self.micro_batch = total, global_batch, micro_batch
        self.rank, self.world, self.first_step = rank, world, first_step

    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.total // self.global_batch)

    def of_step(self, step: int) -> list[list[int]]:
        """This process's micro-batches, without fillers."""
        start, stop = self._span(step)
        mine = list(range(start + self.rank, stop, self.world))
        return [mine[i : i + self.micro_batch] for i in range(0, len(mine), self.micro_batch)]

    def fillers(self, step: int) -> int:
        """How many micro-batches this process makes besides, to have as many as the process that has most samples."""
        start, stop = self._span(step)
        most = -(-(stop - start) // self.world)
        return -(-most // self.micro_batch) - len(self.of_step(step))

    def _span(self, step: int) -> tuple[int, int]:
        start = step * self.global_batch
        return start, min(start + self.global_batch, self.total)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps()):
            yield from self.of_step(step)
            yield from [[self._span(step)[0]]] * self.fillers(step)


def join(given: Sequence[TrainRow | RefusedRow], pad_id: int) -> TrainBatch:
    """Rows → one micro-batch."""
    rows = [row for row in given if isinstance(row, TrainRow)]
    fields = {name: [row.fields[name] for row in rows] for name in rows[0].fields}
    return TrainBatch(
        collate([row.prepared for row in rows], pad_id),
        tuple(row.text for row in rows),
        fields,
        tuple(row.layout for row in rows),
        tuple(row.prepared.text for row in rows),
        tuple(row.prepared.layout for row in rows),
        filler=any(row.filler for row in rows),
        refused=tuple(row.line for row in given if isinstance(row, RefusedRow)),
        columns={name: tuple(row.columns[name] for row in rows) for name in rows[0].columns},
    )


@dataclass(frozen=True)
class Join:
    """``join`` with its padding id, as a collate function that loader processes can receive; what they send back is packed."""

    pad_id: int

    def __call__(self, rows: Sequence[TrainRow | RefusedRow]) -> TrainBatch | Packed:
        batch = join(rows, self.pad_id)
        return pack(batch) if get_worker_info() else batch


def step_batches(
    dataset: TrainDataset, batches: MicroBatches, pad_id: int, workers: int
) -> Iterator[tuple[int, list[TrainBatch]]]:
    """(step, its micro-batches) until the run ends."""
    collate_rows: Callable[[Sequence[TrainRow | RefusedRow]], TrainBatch | Packed] = Join(pad_id)
    if workers:
        dataset.rows.pause()
    with _own_child_signals(), held_back():
        loader = iter(
            DataLoader(
                dataset,
                batch_sampler=batches,  # type: ignore[arg-type]
                collate_fn=collate_rows,
                num_workers=workers,
                worker_init_fn=leave_signals,
            )
        )
    for step in range(batches.first_step, batches.steps()):
        own = [_next(loader) for _ in batches.of_step(step)]
        yield step, own + [replace(_next(loader), filler=True, refused=()) for _ in range(batches.fillers(step))]


@contextmanager
def _own_child_signals() -> Iterator[None]:
    """PyTorch's loader installs a handler that raises wherever this process is when one of its processes dies, in the middle of a step or
    of a checkpoint. ``_next`` notices that itself, within seconds. One that an earlier loader of this program left goes, too."""
    before = signal.getsignal(signal.SIGCHLD)
    if getattr(before, "__module__", "").startswith("torch.utils.data"):
        before = signal.SIG_DFL
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


@contextmanager
def held_back() -> Iterator[None]:
    """Around the start of loader processes: SIGTERM waits in each of their threads, those of libraries that they import too."""
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # whose own start lets SIGTERM through again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def leave_signals(worker: int) -> None:
    """Schedulers send their signals to every process. A loader process that ended by one would break the step behind which a checkpoint
    is to be written: it ends by its parent's alone, and with its parent."""
    end_with_parent()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent() -> None:
    started = multiprocessing.parent_process()  # under forkserver none that getppid knows
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != (started.pid if started else os.getppid()):
        pass
    os._exit(0)


def _next(loader: Iterator[TrainBatch | Packed]) -> TrainBatch:
    """The next micro-batch; an error that a loader process met is again the one line it was, without that process's traceback."""
    try:
        batch = next(loader)
        return unpack(batch) if isinstance(batch, Packed) else batch
    except KdcliError as error:
        last = str(error).strip().splitlines()[-1]
        raise type(error)(last.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise KdcliError(
            f"a loader process died ({one_line(error).rstrip('. ')}): it was killed, often because memory (or /dev/shm) ran out: run the "
            "command again, with fewer --dataloader-num-workers if memory ran out; it continues from its newest checkpoint"
        ) from None
