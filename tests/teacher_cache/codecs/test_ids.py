"""Id coding in both orders: exact round trips, sizes, and ids that do not belong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codecs import frame
from teacher_cache.codecs.ids import RankOrder, SortedOrder
from teacher_cache.errors import CacheError, KdcliError


def ids_of(seed: int, rows: int, k: int, vocabulary: int) -> torch.Tensor:
    """Distinct ids in a row, in no order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, vocabulary, generator=generator).argsort(dim=1)[:, :k]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 5), st.integers(0, 20), st.sampled_from([20, 256, 257, 70_000]))
def test_round_trips(seed: int, rows: int, k: int, vocabulary: int) -> None:
    ids = ids_of(seed, rows, k, vocabulary)
    ranked = RankOrder.decode(RankOrder.encode(ids, vocabulary), rows, k, vocabulary)
    assert ranked.dtype == torch.int64 and torch.equal(ranked, ids)
    data, permutation = SortedOrder.encode(ids, vocabulary)
    ascending = SortedOrder.decode(data, rows, k, vocabulary)
    assert ascending.dtype == torch.int64 and torch.equal(ascending, ids.sort(dim=1).values)
    assert torch.equal(ids.gather(1, permutation), ascending)  # so values follow their ids


def test_exact_bytes() -> None:
    ids = torch.tensor([[5, 0], [3, 7]])
    assert RankOrder.encode(ids, 8).tolist() == [0b11000101, 0b00001110]
    data, permutation = SortedOrder.encode(ids, 8)
    assert permutation.tolist() == [[1, 0], [0, 1]]
    # places first: (0, 3), then the gaps to the next less one: (4, 3)
    assert frame.decompress(data.numpy().tobytes(), "ids") == bytes([0, 3, 4, 3])
    wide, _ = SortedOrder.encode(torch.tensor([[0x010203]]), 1 << 17)
    assert frame.decompress(wide.numpy().tobytes(), "ids") == bytes([3, 2, 1])


def test_sizes_at_a_large_vocabulary() -> None:
    """Bit packing is 18 / 32 of int32; sorted ids of a natural, skewed vocabulary take less."""
    generator = torch.Generator().manual_seed(0)
    skewed = (torch.rand(400, 128, generator=generator).pow(4) * 150_000).long()
    skewed = (skewed.sort(dim=1).values + torch.arange(128)).clamp_max(151_935)  # distinct
    packed, (framed, _) = RankOrder.encode(skewed, 151_936), SortedOrder.encode(skewed, 151_936)
    assert len(packed) == 400 * 128 * 18 // 8
    assert len(framed) < len(packed)


@pytest.mark.parametrize("coder", [RankOrder, SortedOrder])
@pytest.mark.parametrize("wrong", [100, 127, 1 << 33, -1])
def test_ids_beyond_the_vocabulary_raise(coder: type[RankOrder] | type[SortedOrder], wrong: int) -> None:
    with pytest.raises(KdcliError, match=f"id {wrong} is not of a vocabulary of 100"):
        coder.encode(torch.tensor([[1, wrong]]), 100)


def test_an_id_twice_in_a_row_is_refused() -> None:
    with pytest.raises(KdcliError, match="row 1 holds an id twice"):
        SortedOrder.encode(torch.tensor([[1, 2], [4, 4]]), 9)


def test_damage_and_other_shapes_are_cache_errors() -> None:
    ids = ids_of(0, 4, 3, 100)
    packed, (framed, _) = RankOrder.encode(ids, 100), SortedOrder.encode(ids, 100)
    with pytest.raises(CacheError, match="do not hold 15 values"):
        RankOrder.decode(packed, 5, 3, 100)
    with pytest.raises(CacheError, match="not of the vocabulary of 100"):
        RankOrder.decode(torch.full_like(packed, 255), 4, 3, 100)
    with pytest.raises(CacheError, match="at most 9 are read"):
        SortedOrder.decode(framed, 3, 3, 100)
    with pytest.raises(CacheError, match="sorted ids of 12 bytes"):
        SortedOrder.decode(framed, 5, 3, 100)
    with pytest.raises(CacheError, match="sorted ids: a damaged"):
        SortedOrder.decode(framed[:-2], 4, 3, 100)


def test_coders_are_named() -> None:
    assert [(coder.NAME, coder.VERSION) for coder in (RankOrder, SortedOrder)] == [("rank", 1), ("sorted", 1)]
