"""Micro-batches, step after step: an order, a dataset, and the processes that read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch.utils.data import DataLoader, get_worker_info

from student_train.dataset import RefusedSample, TrainBatch, TrainDataset, TrainSample, join
from student_train.loader_signals import held_back, leave_signals, own_child_signals
from student_train.order import MicroBatches
from student_train.packed import Packed, pack, unpack
from student_train.packing import Packing
from teacher_cache.errors import KdcliError, one_line


@dataclass(frozen=True)
class Join:
    """``join`` with its padding id, as a collate function that loader processes can receive; what they send back is packed."""

    pad_id: int
    packing: Packing | None = None

    def __call__(self, rows: Sequence[TrainSample | RefusedSample]) -> TrainBatch | Packed:
        batch = join(rows, self.pad_id, self.packing)
        return pack(batch) if get_worker_info() else batch


def step_batches(
    dataset: TrainDataset, batches: MicroBatches, pad_id: int, workers: int, packing: Packing | None = None
) -> Iterator[tuple[int, list[TrainBatch]]]:
    """(step, its micro-batches) until the run ends. packing: as ``join`` takes it."""
    collate_rows: Callable[[Sequence[TrainSample | RefusedSample]], TrainBatch | Packed] = Join(pad_id, packing)
    if workers:
        dataset.rows.pause()
    with own_child_signals(), held_back():
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
