"""A cache's rows as PyTorch datasets: by number, and as the stream that ``kdcli train-student`` trains on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from student_train.dataset import RefusedSample, TrainDataset, TrainSample
from student_train.library.signal_request import SignalRequest
from student_train.library.signals import SignalSource
from student_train.order import InPlace, MicroBatches, Order
from student_train.student_rows import student_rows
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.planning.plan import difference
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples

MOST_LOADER_PROCESSES = 4096


class CacheDataset(Dataset[TrainSample]):
    """Map-style: row i of the chosen parts, in the order of the cache, prepared by the student's processor.

    ``DataLoader(rows, batch_size=8, shuffle=True, collate_fn=kdcli.Collator(rows))`` asks for a batch at once. Reading in random order
    costs a seek a row and field on a disk, and a request each of an object store: there ``stream`` is the fast way.

    Raises (of a row that is read):
        CompatibilityError: the student cannot read it as the teacher did; a batch leaves out rows that its processor refuses
            (``TeacherSignals.refused``).
        CacheError: it is damaged.
    """

    def __init__(
        self,
        cache: TeacherCache,
        request: SignalRequest,
        rows: CachedSamples,
        processor: Any,
        config: Any,
        max_length: int | None,
    ):
        self.cache, self.request, self.processor, self.config = cache, request, processor, config
        self._rows, self._max_length = rows, max_length
        self.pad_id: int = processor.tokenizer.pad_token_id or 0
        self.source = SignalSource(cache.storage.url, request.served.fields, cache)
        self._read = self._prepared(InPlace(rows.counts))

    def _prepared(self, order: Any) -> TrainDataset:
        request = self.request
        given = (
            self.cache,
            request.parts,
            self._rows,
            order,
            self.processor,
            self.config,
            request.method,
            request.served,
        )
        return student_rows(*given, max_length=self._max_length)

    def __len__(self) -> int:
        return int(self._read.order.rows)

    def __getitem__(self, number: int) -> TrainSample:
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number}: the dataset has {len(self)} rows")
        (row,) = self._read.read([number % len(self)])
        if isinstance(row, RefusedSample):
            raise CompatibilityError(row.line)
        return row

    def __getitems__(self, numbers: Sequence[int]) -> list[TrainSample | RefusedSample]:
        return self._read.__getitems__([number % len(self) for number in numbers])

    def stream(
        self, batch_size: int, seed: int = 0, epochs: float = 1.0, rank: int | None = None, world: int | None = None
    ) -> CacheStream:
        """The rows in the order of ``train-student`` for this seed, in batches of ``batch_size``, split over the processes.

        Args:
            epochs: how often every row comes; the whole run is one stream.
            rank, world: of this process; None: torch.distributed's, else torchrun's, else alone.
        """
        total = round(epochs * len(self))
        if batch_size < 1 or total < 1:
            raise KdcliError(f"batch_size {batch_size}, {len(self)} rows × {epochs:g} epochs give no batch: raise them")
        here = processes() if rank is None or world is None else (rank, world)
        return CacheStream(self, seed, MicroBatches(total, batch_size * here[1], batch_size, *here, 0))

    def ordered(self, seed: int) -> TrainDataset:
        """Positions of ``train-student``'s order → rows."""
        return self._prepared(Order(self._rows.counts, seed))


class NumberedRows(list[TrainSample | RefusedSample]):
    """The rows of one batch of a stream. number: of it. filler: it counts for nothing."""

    number: int
    filler: bool


class CacheStream(IterableDataset[NumberedRows]):
    """Iterable: batches of rows, for ``DataLoader(stream, batch_size=None, collate_fn=kdcli.Collator(rows), num_workers=2)``.

    Loader processes take turns at batches, so their number changes nothing. Every process of a run gets equally many batches; where it
    has no row left for its last, ``TeacherSignals.filler`` says that this one counts for nothing.
    """

    def __init__(self, rows: CacheDataset, seed: int, batches: MicroBatches):
        self.rows, self.seed, self.batches = rows, seed, batches
        self._ordered = rows.ordered(seed)
        self._first = self._next = 0
        self._worker: int | None = None
        self._passes = SharedPass()

    def __len__(self) -> int:
        """Batches of the whole stream, of this process."""
        return self.batches.steps()

    def __iter__(self) -> Iterator[NumberedRows]:
        """From where ``load_state_dict`` was told in the first pass behind it; any other pass runs from the start."""
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        first = worker
        if self._passes.begin(info.num_workers if info else 0, worker):
            first = self._first + (worker if self._worker is None else 0)
        self._next = first
        return self._pass(first, workers)

    def _pass(self, first: int, workers: int) -> Iterator[NumberedRows]:
        for number in range(first, len(self), workers):
            batch = self.at(number)
            self._next = number + workers
            yield batch

    def at(self, number: int) -> NumberedRows:
        """A batch by its number."""
        mine = self.batches.of_step(number)
        positions = mine[0] if mine else [number * self.batches.global_batch]
        batch = NumberedRows(self._ordered.__getitems__(positions))
        batch.number, batch.filler = number, not mine
        return batch

    def state_dict(self, after: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What ``load_state_dict`` goes on from, JSON-able.

        Args:
            after: the batch that was used last. Loader processes read ahead, so with them it must be given (but to torchdata's
                StatefulDataLoader, which asks each of them).
        """
        info = get_worker_info()
        if after is None and info is None and self._passes.elsewhere:
            raise KdcliError(
                "loader processes read ahead of what was used: give state_dict(after=batch), the batch used last"
            )
        number = self._next if after is None else after["teacher"].number + 1
        return {"batch": number, "worker": info.id if info else None, "of": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the batch of ``state_dict``.

        Raises:
            KdcliError: the state is another stream's, with the difference.
        """
        if lines := difference(dict(state["of"]), self._identity()):
            told = "; ".join(lines).replace("cache ", "there ")
            raise KdcliError(f"the state belongs to another stream: {told}")
        self._first = self._next = int(state["batch"])
        self._worker = state["worker"]
        self._passes.told()

    def _identity(self) -> dict[str, Any]:
        request, batches = self.rows.request, self.batches
        return {
            "plan": self.rows.cache.plan_hash,
            "parts": list(request.parts),
            "fields": request.names,
            "seed": self.seed,
            "rows": batches.total,
            "batch_size": batches.micro_batch,
            "world": batches.world,
        }


class SharedPass:
    """Which pass over a stream goes on from a state: the first behind ``told``. Loader processes get copies of the stream and share this.

    Attributes:
        elsewhere: the last pass runs in loader processes: the stream that starts them does not know how far it is.
    """

    def __init__(self) -> None:
        self._shared = torch.zeros(2 + MOST_LOADER_PROCESSES, dtype=torch.int32).share_memory_()
        """Number of loader processes of the last pass; 1 + that of the pass that goes on, 0: none yet; who has begun it."""

    @property
    def elsewhere(self) -> bool:
        return bool(self._shared[0])

    def told(self) -> None:
        """A state was loaded."""
        self._shared.zero_()

    def begin(self, workers: int, worker: int) -> bool:
        """Called by each process that begins a pass (workers 0: the loop's own): whether it goes on from the state."""
        which = int(self._shared[1])
        goes_on = which in (0, 1 + workers) and not self._shared[2 + worker]
        self._shared[0] = workers
        if goes_on:
            self._shared[1] = 1 + workers
            self._shared[2 + worker] = 1
        return goes_on


def processes() -> tuple[int, int]:
    """(rank, world) of this process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
