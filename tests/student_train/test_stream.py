"""The order of training rows: every row once an epoch, a pure function, the same from any step on and for any world size."""

from __future__ import annotations

import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.stream import BLOCK_SHARDS, MicroBatches, Order
from teacher_cache.errors import CacheError

COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=40).filter(any)


@settings(deadline=None, max_examples=60)
@given(COUNTS, st.integers(0, 2**32))
def test_every_row_once_an_epoch(counts: list[int], seed: int) -> None:
    order = Order(counts, seed)
    every = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    for epoch in range(2):
        seen = [order.at(epoch * order.rows + i) for i in range(order.rows)]
        assert len(seen) == len(every) and set(seen) == every


@settings(deadline=None, max_examples=30)
@given(COUNTS, st.integers(0, 1000), st.data())
def test_a_position_depends_on_nothing_else(counts: list[int], seed: int, data: st.DataObject) -> None:
    """Whatever was asked before, in another process, after pickling."""
    order = Order(counts, seed)
    expected = [order.at(p) for p in range(3 * order.rows)]
    other = pickle.loads(pickle.dumps(order))
    asked = data.draw(st.lists(st.integers(0, 3 * order.rows - 1), max_size=12))
    assert [other.at(p) for p in asked] == [expected[p] for p in asked]


def test_blocks_keep_reading_nearly_sequential_and_mix_sixteen_shards() -> None:
    order = Order([10] * 50, seed=3)
    epoch = [order.at(p)[0] for p in range(order.rows)]
    for start in range(0, order.rows, 10 * BLOCK_SHARDS):
        block = epoch[start : start + 10 * BLOCK_SHARDS]
        assert len(set(block)) == min(BLOCK_SHARDS, 50 - start // 10)
        assert all(count == 10 for count in Counter(block).values()), "a shard is read in one block only"
    assert len(set(epoch[:32])) >= 10, "one batch sees many shards"
    assert epoch != [order.at(order.rows + p)[0] for p in range(order.rows)], "another epoch, another order"
    assert epoch != [Order([10] * 50, seed=4).at(p)[0] for p in range(order.rows)]


SPLITS = st.tuples(st.integers(1, 200), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))


@settings(deadline=None, max_examples=100)
@given(SPLITS)
def test_processes_share_every_step_exactly(split: tuple[int, int, int, int]) -> None:
    """(total, micro batch, accumulation, world): each sample once, in order of steps; all processes make as many micro-batches."""
    total, micro, accumulate, world = split
    global_batch = micro * accumulate * world
    ranks = [MicroBatches(total, global_batch, micro, rank, world, 0) for rank in range(world)]
    seen: list[int] = []
    for step in range(ranks[0].steps()):
        mine = [one.of_step(step) for one in ranks]
        assert all(0 < len(batch) <= micro for batches in mine for batch in batches)
        assert len({len(batches) + one.fillers(step) for batches, one in zip(mine, ranks)}) == 1
        assert all(len(batches) <= accumulate for batches in mine)
        of_step = sorted(p for batches in mine for batch in batches for p in batch)
        assert of_step == list(range(step * global_batch, step * global_batch + len(of_step)))
        seen += of_step
    assert seen == list(range(total))


@settings(deadline=None, max_examples=50)
@given(SPLITS, st.data())
def test_resuming_continues_where_it_was(split: tuple[int, int, int, int], data: st.DataObject) -> None:
    total, micro, accumulate, world = split
    make = lambda first: MicroBatches(total, micro * accumulate * world, micro, world - 1, world, first)  # noqa: E731
    whole = make(0)
    first = data.draw(st.integers(0, whole.steps()))
    done = sum(len(whole.of_step(step)) + whole.fillers(step) for step in range(first))
    assert list(make(first)) == list(whole)[done:]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_other_numbers_of_processes_see_each_remaining_sample_once(
    total: int, global_batch: int, micro: int, worlds: list[int]
) -> None:
    """A run that is stopped and resumed with another number of processes, again and again, at any step."""
    seen: list[int] = []
    steps = -(-total // global_batch)
    for number, world in enumerate(worlds):
        first, stop = (steps * number // len(worlds), steps * (number + 1) // len(worlds))
        ranks = [MicroBatches(total, global_batch, micro, rank, world, first) for rank in range(world)]
        for step in range(first, stop):
            own = [one.of_step(step) for one in ranks]
            assert len({len(batches) + one.fillers(step) for batches, one in zip(own, ranks)}) == 1
            seen += sorted(p for batches in own for batch in batches for p in batch)
    assert seen == list(range(total))


def keys_of(batches: Any) -> list[tuple[int, list[tuple[str, ...]]]]:
    return [(step, [one.batch.keys for one in each]) for step, each in batches]


def test_loader_processes_and_resuming_give_the_same_batches(open_stage: Callable[..., Any], tiny_cache: Path) -> None:
    """In the same order and with the same teacher fields, whoever reads them."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    _, alone = open_stage(tiny_cache, **sizes)
    _, with_workers = open_stage(tiny_cache, dataloader_num_workers=2, **sizes)
    expected = list(alone(0))
    assert len(keys_of(expected)) == 6
    found = list(with_workers(0))
    assert keys_of(found) == keys_of(expected)
    assert keys_of(alone(4)) == keys_of(expected)[4:] == keys_of(with_workers(4))
    for (_, ours), (_, theirs) in zip(found, expected):
        for one, other in zip(ours, theirs):
            for name in other.fields:
                pairs = zip(one.fields[name], other.fields[name])
                assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_tar_stops_training_and_names_the_shard(
    open_stage: Callable[..., Any], tiny_cache: Path, copy_of: Callable[[Path], Path], workers: int
) -> None:
    """One flipped byte in a field's tar: no row is skipped, no other row stands in; one line."""
    cache = copy_of(tiny_cache)
    tar = sorted((cache / "fields" / "vision_hidden" / "data").glob("000003-*.tar"))[0]
    with tarfile.open(tar) as opened:
        member = max(opened.getmembers(), key=lambda one: one.size)
    data = bytearray(tar.read_bytes())
    data[member.offset_data + member.size // 2] ^= 1
    tar.write_bytes(data)
    trainer, batches_from = open_stage(cache, dataloader_num_workers=workers)
    with pytest.raises(CacheError, match=r"shard 000003 of fields/vision_hidden is damaged.*checksum") as caught:
        trainer.train(batches_from)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
