"""The log-prob quantiser: half a step, whatever the value; falling rows as differences with escapes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codecs import log_probs as codec
from teacher_cache.errors import CacheError, KdcliError

STEPS = (1 / 64, 1 / 16, 0.1, 1e-3)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(-1e4, 0, width=32), min_size=1, max_size=30), st.sampled_from(STEPS))
def test_within_half_a_step(values: list[float], step: float) -> None:
    given_ = torch.tensor(values)
    symbols = codec.quantise(given_, step)
    assert symbols.dtype == torch.int64 and (symbols >= 0).all()
    restored = codec.dequantise(symbols, step)
    assert restored.dtype == torch.float32
    rounding = given_.abs().double() * 2.0**-24 + 1e-12  # of float32, which is what comes back
    assert ((restored.double() - given_.double()).abs() <= step / 2 * (1 + 1e-9) + rounding).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 5), st.integers(0, 9), st.sampled_from([0.1, 3.0, 200.0]))
def test_falling_rows_round_trip(seed: int, rows: int, k: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    falling = -(torch.rand(rows, k, generator=generator) * scale).sort(dim=1).values
    if rows and k > 1:
        falling[0, -1] = -math.inf
    decoded = codec.decode(codec.encode(falling, 1 / 64), rows, k, 1 / 64)
    assert torch.equal(decoded, codec.dequantise(codec.quantise(falling, 1 / 64), 1 / 64))
    assert decoded.shape == (rows, k)


def test_exact_bytes() -> None:
    rows = torch.tensor([[-0.5, -1.0, -1.0], [-0.0, -70000.0, -math.inf]])
    assert codec.quantise(rows, 0.5).tolist() == [[1, 2, 2], [0, 140_000, codec.INFINITE]]
    data = codec.encode(rows, 0.5).numpy().tobytes()
    escaped = (140_000).to_bytes(4, "little") + (codec.INFINITE - 140_000).to_bytes(4, "little")
    assert data == bytes([1, 0, 0, 0, 1, 255, 0, 255]) + escaped
    assert codec.decode(codec.encode(rows, 0.5), 2, 3, 0.5).tolist() == rows.tolist()


def test_escapes_begin_where_places_end() -> None:
    for first, second, size in [(65534, 254, 3), (65535, 254, 7), (65534, 255, 7), (65535, 255, 11)]:
        rows = torch.tensor([[-float(first), -float(first + second)]])
        data = codec.encode(rows, 1.0)
        assert len(data) == size
        assert torch.equal(codec.decode(data, 1, 2, 1.0), rows)


def test_what_is_no_log_prob_is_refused() -> None:
    for value in (math.nan, 1e-3, math.inf):
        with pytest.raises(KdcliError, match="is not in"):
            codec.quantise(torch.tensor([-1.0, value]), 0.1)
    with pytest.raises(KdcliError, match="raise the step"):
        codec.quantise(torch.tensor([-1e12]), 1e-3)
    with pytest.raises(KdcliError, match="steps above 0"):
        codec.quantise(torch.tensor([-1.0]), 0.0)
    with pytest.raises(KdcliError, match="must fall along a row"):
        codec.encode(torch.tensor([[-2.0, -1.0]]), 0.1)


def test_damage_is_a_cache_error() -> None:
    data = codec.encode(torch.tensor([[-1.0, -90.0]]), 0.1)
    with pytest.raises(CacheError, match="do not hold 5 rows"):
        codec.decode(data, 5, 2, 0.1)
    for cut in (data[:-1], torch.cat([data, data[:1]])):
        with pytest.raises(CacheError, match="escaped values"):
            codec.decode(cut, 1, 2, 0.1)
