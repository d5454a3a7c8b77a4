"""The entropy coder: what goes in comes out, at the rate that the tables promise, in bytes that never change unnoticed."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codecs.entropy import MOST_ROWS, Decoder, Stream, encode
from teacher_cache.codecs.entropy_tables import MOST_ENTRIES, Table, fit_smooth_table, fit_table
from teacher_cache.errors import KdcliError

INTS = st.integers(-(2**31), 2**31 - 1)


def dyadic(*weights: float, low: int = 0) -> Table:
    """A table of exact binary fractions, escape last: nothing is rounded anywhere."""
    return Table(low, torch.tensor(weights, dtype=torch.float32))


def read_back(streams: list[Stream], rows: int = 0) -> list[np.ndarray]:
    decoder = Decoder(encode(streams, rows))
    assert decoder.rows == rows
    taken = [decoder.take(len(symbols), table) for symbols, table in streams]
    decoder.finish()
    return taken


@st.composite
def tables(draw: st.DrawFn) -> Table:
    entries = draw(st.sampled_from([2, 3, 17, 257]))
    weights = np.random.default_rng(draw(st.integers(0, 99))).exponential(size=entries) ** draw(
        st.sampled_from([0.1, 1, 8])
    )
    weights = np.maximum(weights / weights.sum(), 2.0**-22)
    return Table(draw(st.integers(-300, 300)), torch.from_numpy((weights / weights.sum()).astype(np.float32)))


def symbols_for(table: Table) -> st.SearchStrategy[list[int]]:
    """What the table has a place for, mostly, and any integer."""
    inside = st.integers(table.low, table.low + table.escape - 1)
    return st.lists(st.one_of(inside, inside, inside, INTS), max_size=60)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_integers_in_any_streams_come_back(data: st.DataObject) -> None:
    every = data.draw(st.lists(tables(), max_size=5))
    streams = [(np.array(data.draw(symbols_for(table)), dtype=np.int64), table) for table in every]
    for (symbols, _), taken in zip(streams, read_back(streams, rows=len(streams))):
        assert np.array_equal(symbols, taken)


def test_nothing_at_all() -> None:
    assert encode([], 0).numel() == encode([(np.zeros(0, np.int32), dyadic(0.5, 0.5))], 0).numel() == 16
    assert [len(taken) for taken in read_back([(np.zeros(0, np.int32), dyadic(0.5, 0.5))])] == [0]


def test_streams_of_two_dimensions_are_read_row_by_row() -> None:
    symbols = np.arange(12, dtype=np.int32).reshape(3, 4) % 3
    decoder = Decoder(encode([(symbols[:, [1, 3]], dyadic(0.25, 0.25, 0.25, 0.25))], 3))
    assert np.array_equal(decoder.take(6, dyadic(0.25, 0.25, 0.25, 0.25)).reshape(3, 2), symbols[:, [1, 3]])


def test_an_alphabet_as_large_as_a_vocabulary() -> None:
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.2, 20_000), 151_935)
    table = fit_table(ids[:4000], 0, 151_935, np.full(151_936, 0.5))
    unseen = np.setdiff1d(ids[4000:], ids[:4000])
    assert len(unseen) > 100
    (taken,) = read_back([(ids, table)])
    assert np.array_equal(taken, ids)


GOLDEN = "070000000200000006000000ffffff7f80ffffffb97917d158636b88374d7d541dd81402a02d78481cf20400"
"""Two streams, two escapes, dyadic tables. Made when version 1 was; a library that writes other bytes makes old caches unreadable."""


def golden_streams() -> list[Stream]:
    first = np.array([0, 1, 2, 2**31 - 1, 0, 0, 1, 2, 0, 0, 1, 0, -128, 0, 0, 2] * 2)
    first[16:] = np.abs(first[16:]) % 3
    second = np.array([-4, -3, -2, -1, 0, 1, 2, -4, -1, -1] * 3)
    return [(first, dyadic(0.5, 0.25, 0.125, 0.125)), (second, dyadic(*[0.125] * 8, low=-4))]


def test_the_bytes_never_change() -> None:
    assert encode(golden_streams(), 7).numpy().tobytes().hex() == GOLDEN


def test_old_bytes_stay_readable() -> None:
    decoder = Decoder(torch.frombuffer(bytearray(bytes.fromhex(GOLDEN)), dtype=torch.uint8))
    assert decoder.rows == 7
    for symbols, table in golden_streams():
        assert np.array_equal(decoder.take(len(symbols), table), symbols)
    decoder.finish()


@pytest.mark.parametrize("scale", [0.02, 0.3, 2.0, 30.0])
@pytest.mark.parametrize("count", [200, 20_000])
def test_the_rate_is_that_of_the_table(scale: float, count: int) -> None:
    rng = np.random.default_rng(1)
    symbols = np.rint(rng.laplace(scale=scale, size=count)).astype(np.int32)
    table = fit_table(np.rint(rng.laplace(scale=scale, size=5000)).astype(np.int32), -127, 127)
    spent = encode([(symbols, table)], 0).numel()
    assert spent <= 1.05 * table.bits(symbols) / 8 + 16 + 8


def test_a_fitted_table_costs_little_more_than_the_entropy() -> None:
    rng = np.random.default_rng(2)
    seen, new = (np.rint(rng.laplace(scale=3.0, size=50_000)).astype(np.int32) for _ in range(2))
    counts = np.unique(new, return_counts=True)[1] / len(new)
    entropy = -(counts * np.log2(counts)).sum() * len(new)
    assert fit_table(seen, -127, 127).bits(new) <= 1.01 * entropy
    assert fit_smooth_table(seen).bits(new) <= 1.03 * entropy


def test_tables_are_distributions() -> None:
    for table in (fit_table(np.zeros(0, np.int64), -3, 3), fit_smooth_table(np.zeros(0, np.int64))):
        assert table.probabilities.dtype == torch.float32
        assert (table.probabilities > 0).all()
        assert float(table.probabilities.double().sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("middle", [-100_000, -9000, 0, 9000, 100_000])
def test_measures_far_from_zero_have_places(middle: int) -> None:
    """A teacher whose mean logit is −100 has symbols near −12,800."""
    symbols = middle + np.rint(np.random.default_rng(3).normal(scale=200, size=2000)).astype(np.int64)
    table = fit_smooth_table(symbols)
    assert (table.places(symbols) < table.escape).all()
    assert table.bits(symbols) < 12 * len(symbols)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(-50, 50), INTS), max_size=40))
def test_any_measures_make_a_table(values: list[int]) -> None:
    symbols = np.array(values, dtype=np.int64)
    table = fit_smooth_table(symbols)
    assert 2 <= len(table.probabilities) <= 2 * MOST_ENTRIES
    (taken,) = read_back([(symbols, table)])
    assert np.array_equal(taken, symbols)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_infinite_measures_do_not_stretch_the_table(share: float) -> None:
    """Empty tails have the symbol 2^31 − 1: a blur as wide as their spread would ask for gigabytes."""
    symbols = np.arange(1000) % 40
    symbols[: int(share * 1000)] = 2**31 - 1
    table = fit_smooth_table(symbols)
    assert len(table.probabilities) < 100
    (taken,) = read_back([(symbols, table)])
    assert np.array_equal(taken, symbols)


def test_tables_travel_to_worker_processes() -> None:
    table = dyadic(0.5, 0.25, 0.25, low=-1)
    table.model  # noqa: B018 (what the library made does not pickle)
    again = pickle.loads(pickle.dumps(table))
    symbols = np.array([-1, 0, 5])
    assert again.low == -1 and torch.equal(again.probabilities, table.probabilities)
    assert torch.equal(encode([(symbols, table)], 1), encode([(symbols, again)], 1))


def test_what_no_reader_would_take_is_not_written() -> None:
    table = dyadic(0.5, 0.5)
    with pytest.raises(KdcliError, match="use another codec"):
        encode([], MOST_ROWS + 1)
    for beyond in (2**31, -(2**31) - 1):
        with pytest.raises(KdcliError, match="too large"):
            encode([(np.array([beyond]), table)], 1)
