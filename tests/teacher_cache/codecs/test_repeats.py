"""Ids as places in the row before, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codecs import repeats
from teacher_cache.codecs.repeats import find, resolve
from teacher_cache.errors import CacheError


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 30), st.integers(1, 9), st.integers(9, 40), st.integers(0, 10**6))
def test_round_trip(rows: int, k: int, vocabulary: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    ids = np.array([generator.permutation(vocabulary)[:k] for _ in range(rows)], dtype=np.int64).reshape(rows, k)
    places = find(ids)
    assert (places[:1] == k).all()
    assert np.array_equal(resolve(places, ids[places == k]), ids)


def test_chunks_have_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.array([np.random.default_rng(i // 3).permutation(20)[:5] for i in range(40)])
    whole = find(ids)
    monkeypatch.setattr(repeats, "CHUNK", 7)
    assert np.array_equal(find(ids), whole)


def test_a_row_that_repeats_costs_no_new_id() -> None:
    ids = np.tile(np.array([[7, 3, 9]]), (2000, 1))
    places = find(ids)
    assert (places[1:] == [0, 1, 2]).all()
    assert np.array_equal(resolve(places, np.array([7, 3, 9])), ids)


@pytest.mark.parametrize(
    ("places", "fresh"),
    [
        ([[0, 2]], [5]),  # the first row has none before it
        ([[2, 2], [0, 1]], [5]),
        ([[2, 2], [0, 3]], [5, 6]),
        ([[2, 2], [0, -1]], [5, 6]),
    ],
)
def test_what_does_not_fit_together_is_refused(places: list[list[int]], fresh: list[int]) -> None:
    with pytest.raises(CacheError, match="do not fit together"):
        resolve(np.array(places), np.array(fresh))
