"""How a step is divided: every sample once, and no division with less padding."""

from __future__ import annotations

from itertools import combinations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.division import WIDEST, balanced, grouped
from student_train.order import MicroBatches


def positions(parts: list[list[int]], lengths: list[int]) -> int:
    """Of the batches, with padding."""
    return sum(len(part) * max(lengths[i] for i in part) for part in parts)


def least(lengths: list[int], parts: int, micro_batch: int) -> int:
    """By trying every cut of the sorted lengths."""
    order, found = sorted(lengths, reverse=True), []
    for cuts in combinations(range(1, len(order)), parts - 1):
        sliced = [order[a:b] for a, b in zip((0, *cuts), (*cuts, len(order)))]
        sizes = [len(one) * one[0] for one in sliced]
        if max(sizes) <= micro_batch * order[0] and max(map(len, sliced)) <= WIDEST * micro_batch:
            found.append(sum(sizes))
    return min(found)


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=11), st.integers(1, 5), st.data())
def test_no_division_has_less_padding(lengths: list[int], micro_batch: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(-(-len(lengths) // micro_batch), len(lengths)))
    found = grouped(lengths, parts, micro_batch)
    assert len(found) == parts and sorted(i for part in found for i in part) == list(range(len(lengths)))
    assert positions(found, lengths) == least(lengths, parts, micro_batch)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.integers(1, 40))
def test_no_part_is_longer_than_one_of_equal_shares_and_a_sample(lengths: list[int], parts: int) -> None:
    found = balanced(lengths, parts)
    assert len(found) == parts
    assert max(sum(lengths[i] for i in part) for part in found) <= sum(lengths) / parts + max(lengths)


def test_lengths_that_differ_tenfold_leave_little_padding() -> None:
    """Images of 576 tokens with short answers beside long conversations, 128 samples a step in 8 micro-batches."""
    drawn = torch.Generator().manual_seed(0)
    real = alone = dealt = 0
    for _ in range(20):
        text = torch.rand(128, generator=drawn) < 0.06
        pictures = 576 + 150 * torch.exp(0.8 * torch.randn(128, generator=drawn))
        texts = 735 * torch.exp(0.8 * torch.randn(128, generator=drawn))
        lengths = torch.where(text, texts, pictures).clamp(50, 2048).int().tolist()
        real += sum(lengths)
        alone += positions([list(range(i, i + 16)) for i in range(0, 128, 16)], lengths)
        dealt += positions(grouped(lengths, 8, 16), lengths)
    assert real / dealt > 0.94 and real / alone < 0.6


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 60), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.integers(0, 1000)
)
def test_a_step_keeps_its_samples(
    total: int, global_batch: int, micro_batch: int, world: int, packed: bool, seed: int
) -> None:
    """Whatever the number of processes, each of which makes as many micro-batches; none is empty."""
    lengths = torch.randint(1, 3000, (total,), generator=torch.Generator().manual_seed(seed)).tolist()
    given_lengths = lambda asked: [lengths[one] for one in asked]  # noqa: E731
    ranks = [MicroBatches(total, global_batch, micro_batch, r, world, 0, given_lengths, packed) for r in range(world)]
    seen: list[int] = []
    for step in range(ranks[0].steps()):
        mine = [one.of_step(step) for one in ranks]
        assert all(batch == sorted(batch) and batch for batches in mine for batch in batches)
        assert len({len(batches) + one.fillers(step) for batches, one in zip(mine, ranks)}) == 1
        seen += sorted(p for batches in mine for batch in batches for p in batch)
    assert seen == list(range(total))
    assert list(ranks[-1]) == [
        batch
        for step in range(ranks[0].steps())
        for batch in [*ranks[-1].of_step(step), *[[step * global_batch]] * ranks[-1].fillers(step)]
    ]


def test_packed_processes_get_as_many_tokens() -> None:
    lengths = torch.randint(50, 2048, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    ranks = [MicroBatches(64, 64, 8, r, 4, 0, lambda asked: [lengths[i] for i in asked], True) for r in range(4)]
    tokens = [sum(lengths[i] for batch in one.of_step(0) for i in batch) for one in ranks]
    assert max(tokens) < 1.03 * min(tokens)
