"""Position → (shard, sample). The order is a pure function of (seed, position): state to resume from is two integers.

Shards are shuffled, then samples inside blocks of ``BLOCK_SHARDS`` shards, so that storage is read nearly sequentially and every
batch still mixes many shards. Position p counts samples over all epochs; any number of processes shares one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from student_train.division import balanced, grouped

BLOCK_SHARDS = 16
Lengths = Callable[[Sequence[int]], Sequence[int]]
"""Positions → tokens of the samples there."""


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


class MicroBatches:
    """Positions of every micro-batch of one process, step after step, from ``first_step`` on.

    A step has the same samples with any number of processes, ``global_batch`` of them; the last step of a run may have fewer. Process r
    takes every world-th micro-batch of a step. All make the same number of them; who has none left makes one of the step's first sample,
    as a filler.

    Args:
        lengths: tokens of the samples at some positions: micro-batches then hold samples of like lengths, or, where they are ``packed``,
            as many tokens each. None: samples in their order, dealt one by one.
    """

    def __init__(
        self,
        total: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        first_step: int,
        lengths: Lengths | None = None,
        packed: bool = False,
    ):
        self.total, self.global_batch, self.micro_batch = total, global_batch, micro_batch
        self.rank, self.world, self.first_step = rank, world, first_step
        self._lengths, self._packed = lengths, packed
        self._divided = lru_cache(maxsize=64)(self._divide)  # loader processes are some steps ahead

    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.total // self.global_batch)

    def of_step(self, step: int) -> list[list[int]]:
        """This process's micro-batches, without fillers."""
        return self._divided(step)[self.rank]

    def fillers(self, step: int) -> int:
        """How many micro-batches this process makes besides, to have as many as the process that has most."""
        return max(map(len, self._divided(step))) - len(self.of_step(step))

    def _divide(self, step: int) -> list[list[list[int]]]:
        """Micro-batches of every process."""
        start = step * self.global_batch
        stop, world = min(start + self.global_batch, self.total), self.world
        parts = max(-(-(stop - start) // self.micro_batch), min(world, stop - start))
        if self._lengths is None or parts == 1:
            dealt = [list(range(start + rank, stop, world)) for rank in range(world)]
            return [[mine[i : i + self.micro_batch] for i in range(0, len(mine), self.micro_batch)] for mine in dealt]
        lengths = self._lengths(range(start, stop))
        found = balanced(lengths, parts) if self._packed else grouped(lengths, parts, self.micro_batch)
        # One for every process in turn, there and back: nobody always has the longest.
        turns = [found[i : i + world][:: -1 if i // world % 2 else 1] for i in range(0, parts, world)]
        dealt_parts = [[turn[rank] for turn in turns if rank < len(turn)] for rank in range(world)]
        return [[[start + i for i in part] for part in mine] for mine in dealt_parts]

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps()):
            yield from self.of_step(step)
            yield from [[step * self.global_batch]] * self.fillers(step)
