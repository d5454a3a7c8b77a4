"""Symbols coded with the frequencies of their own record: exact, bounded, and damage is always noticed."""

from __future__ import annotations

import random
import resource

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codecs import frame
from teacher_cache.codecs.adaptive import LEAST_GROUP, decode, encode, groups
from teacher_cache.errors import CacheError

COUNTS = [3000, 0, 1500, 5900, 9000, 9000, 9001, 30]


def laplace(scales: list[float], counts: list[int], seed: int = 0, dtype: type = np.int16) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([np.rint(rng.laplace(size=n) * s) for n, s in zip(counts, scales)]).astype(dtype)


SYMBOLS = laplace([40, 1, 20, 4, 1.2, 0.4, 0.1, 0.1], COUNTS)
DATA = encode(SYMBOLS, COUNTS).numpy().tobytes()


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def refused(data: bytes, counts: list[int] = COUNTS) -> bool:
    """Read or refused by name; anything else fails the test."""
    try:
        assert len(decode(as_tensor(data), counts)) == sum(counts)
    except CacheError as error:
        assert "adaptively coded record is damaged" in str(error)
        return True
    return False


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9000), max_size=6),
    st.sampled_from([0.0, 0.4, 30.0, 9000.0, 1e9]),
    st.integers(0, 10**6),
)
def test_symbols_come_back(counts: list[int], scale: float, seed: int) -> None:
    """Of any size: in 16 bits where they fit, in 32 else."""
    wide = np.concatenate([[0.0], laplace([scale] * len(counts), counts, seed, np.float64) if counts else []])[1:]
    symbols = np.clip(wide, 1 - 2**31, 2**31 - 1).astype(np.int64)
    kind = np.int16 if len(symbols) == 0 or np.abs(symbols).max() < 2**15 else np.int32
    read = decode(encode(symbols.astype(kind), counts), counts)
    assert np.array_equal(read.numpy(), symbols) and read.numpy().dtype == (kind if len(symbols) else np.int16)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3 * LEAST_GROUP), max_size=12))
def test_groups_are_neighbours_and_none_but_the_last_is_small(counts: list[int]) -> None:
    found = groups(counts)
    assert sum(found) == sum(counts) and all(one > 0 for one in found)
    assert all(one >= LEAST_GROUP for one in found[:-1])


@pytest.mark.parametrize("scale", [0.05, 0.15, 0.25, 0.4, 0.7, 1.2, 2.0, 4.0, 10.0, 30.0, 90.0, 400.0, 3000.0])
def test_a_group_costs_about_its_entropy(scale: float) -> None:
    """Whatever its scale, however it is packed: within 4 %."""
    symbols = laplace([scale], [120_000], 3)
    share = np.unique(symbols, return_counts=True)[1] / len(symbols)
    bits = -(share * np.log2(share)).sum() * len(symbols)
    assert 8 * encode(symbols, [120_000]).numel() < 1.04 * bits + 3000


def test_every_mode_is_used() -> None:
    plain = frame.decompress(DATA, "symbols")
    assert {0, 1, 2, 3} <= {plain[4 + 5 * number] for number in range(len(groups(COUNTS)))}


def test_every_flip_and_every_cut_is_noticed() -> None:
    """But for a bit of the frame's header that means nothing."""
    rng, unseen = random.Random(0), 0
    assert not refused(DATA)
    for _ in range(1000):
        changed = bytearray(DATA)
        changed[rng.randrange(len(DATA))] ^= 1 << rng.randrange(8)
        if not refused(bytes(changed)):
            assert np.array_equal(decode(as_tensor(bytes(changed)), COUNTS).numpy(), SYMBOLS)
            unseen += 1
    assert unseen <= 2
    assert all(refused(DATA[: rng.randrange(len(DATA))]) for _ in range(200))
    assert all(refused(DATA[:length]) for length in range(60)) and refused(DATA + b"\0")


@pytest.mark.parametrize("counts", [[], [1], COUNTS[:-1], [*COUNTS, 5], [9000, *COUNTS[1:]], [2**26]])
def test_another_number_of_symbols_is_noticed(counts: list[int]) -> None:
    assert refused(DATA, counts)


def test_whoever_mends_the_checksum_gets_other_symbols_or_a_refusal_and_no_memory() -> None:
    """Damage behind a right checksum is somebody's work: no other error, and nothing made beyond what the reader knows."""
    rng, plain = random.Random(1), frame.decompress(DATA, "symbols")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(4000):
        body = bytearray(plain)
        for _ in range(rng.randint(1, 6)):
            body[rng.randrange(min(len(body), rng.choice([60, 400, len(body)])))] = rng.randrange(256)
        if number % 4 == 0:
            del body[rng.randrange(len(body)) :]
        refused(frame.compress(bytes(body)))
    assert refused(frame.compress(b"\0" * 10_000_000)), "a thousand bytes that would be ten million"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "KiB"


@pytest.mark.parametrize(
    "data", [torch.zeros(9), torch.zeros(3, 3, dtype=torch.uint8), torch.zeros(0, dtype=torch.int8)]
)
def test_records_of_another_type(data: torch.Tensor) -> None:
    with pytest.raises(CacheError, match="adaptively coded record is damaged"):
        decode(data, COUNTS)
