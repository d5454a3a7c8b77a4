"""What every row codec promises, run over each codec that the folder holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codecs import container, rotation, row_codec, row_codecs
from teacher_cache.errors import CacheError

VERSIONS = {"int8": (1, 2), "int4": (1, 2)}
"""Of a codec that has more than one that can be read."""
CODECS = {f"{name} {v}": row_codec(name, v) for name in row_codecs() for v in VERSIONS.get(name, (1,))}


def turned(rows: torch.Tensor, codec: str) -> torch.Tensor:
    """What version 2 rounds."""
    rows = rotation.rotate(rows.float())
    if len(rows) < rotation.MANY:
        return rows
    plain = row_codec(codec, 1)
    return rows - plain.decode(plain.encode(rows.mean(dim=0, keepdim=True)))


def together(errors: torch.Tensor) -> torch.Tensor:
    """A turned row's error may fall on one entry: the length of all."""
    return errors.double().square().sum(dim=1, keepdim=True).sqrt().expand_as(errors)


BOUNDS = {
    "fp32 1": lambda rows: torch.zeros_like(rows),
    "bf16 1": lambda rows: rows.abs() * 2.0**-8,
    "int8 1": lambda rows: (rows.abs().amax(dim=1, keepdim=True) / 254).expand_as(rows),
    "int4 1": lambda rows: group_largest(rows) / 14 * (1 + 2.0**-8),
}
BOUNDS |= {
    "int8 2": lambda rows: together(BOUNDS["int8 1"](turned(rows, "int8"))),
    "int4 2": lambda rows: together(BOUNDS["int4 1"](turned(rows, "int4"))),
}
"""Largest error of each entry, as the codec's module states it. A new codec adds its own."""


def group_largest(rows: torch.Tensor) -> torch.Tensor:
    """Largest magnitude among the 64 columns that share a scale, for every entry."""
    groups = rows.abs().split(64, dim=1)
    return torch.cat([one.amax(dim=1, keepdim=True).expand_as(one) for one in groups], dim=1)


def rows_of(seed: int, rows: int, width: int, scale: float) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


def test_every_codec_states_a_bound() -> None:
    assert set(CODECS) == set(BOUNDS)
    for name, newest in row_codecs().items():
        assert newest is CODECS[f"{name} {newest.VERSION}"] is row_codec(name)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 140), st.sampled_from([1e-30, 1e-3, 1.0, 300.0, 1e30]))
def test_round_trip_within_the_bound(name: str, seed: int, count: int, width: int, scale: float) -> None:
    codec, rows = CODECS[name], rows_of(seed, count, width, scale)
    stored = container.unpack(container.pack(codec.encode(rows)))
    decoded = codec.decode(stored)
    assert decoded.dtype == torch.float32
    assert decoded.shape == rows.shape
    # The step itself is rounded to float32, and so is what is turned.
    turning = 1e-5 * rows.abs().amax() if name.endswith(" 2") else 0.0
    assert ((decoded - rows).abs() <= BOUNDS[name](rows) * (1 + 1e-5) + turning).all()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_teachers_of_any_dtype(name: str, dtype: torch.dtype) -> None:
    rows = rows_of(1, 5, 16, 2.0).to(dtype)
    decoded = CODECS[name].decode(CODECS[name].encode(rows))
    assert ((decoded - rows.float()).abs() <= BOUNDS[name](rows.float()) * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", CODECS)
def test_empty_rows(name: str) -> None:
    for shape in ((0, 16), (0, 0)):
        stored = container.unpack(container.pack(CODECS[name].encode(torch.zeros(shape))))
        assert CODECS[name].decode(stored).shape == shape


@pytest.mark.parametrize("name", CODECS)
def test_rows_of_zeros_and_equal_values(name: str) -> None:
    rows = torch.cat([torch.zeros(1, 8), torch.full((1, 8), -3.0)])
    decoded = CODECS[name].decode(CODECS[name].encode(rows))
    assert not decoded[0].any() and not CODECS[name].decode(CODECS[name].encode(torch.zeros(20, 8))).any()
    assert ((decoded - rows).abs() <= BOUNDS[name](rows) + 1e-5).all()
    if not name.endswith(" 2"):
        torch.testing.assert_close(decoded, rows)


@pytest.mark.parametrize("name", CODECS)
def test_equal_rows_are_equal_bytes(name: str) -> None:
    rows = rows_of(2, 7, 33, 1.0)
    strided = rows_of(2, 7, 33, 1.0).T.contiguous().T
    assert not strided.is_contiguous()
    assert container.pack(CODECS[name].encode(rows)) == container.pack(CODECS[name].encode(strided))


@pytest.mark.parametrize(("width", "size"), [(256, 128 + 8), (64, 32 + 2), (65, 32 + 1 + 4), (3, 1 + 1 + 2)])
def test_int4_is_half_a_byte_a_value_and_a_scale_for_64(width: int, size: int) -> None:
    for version in (1, 2):
        stored = row_codec("int4", version).encode(rows_of(3, 15, width, 1.0))
        assert sum(tensor.nbytes for tensor in stored.values()) == 15 * size


def test_int4_confines_an_outlier_to_its_group() -> None:
    rows = rows_of(4, 5, 256, 1.0)
    rows[:, 3] = 1000.0
    decoded = CODECS["int4 1"].decode(CODECS["int4 1"].encode(rows))
    assert (decoded[:, 64:] - rows[:, 64:]).abs().max() < 0.4


def test_the_name_decides_and_unknown_ones_are_refused() -> None:
    assert row_codec("bf16", 1) is CODECS["bf16 1"] and row_codec("int8", 1) is CODECS["int8 1"]
    with pytest.raises(CacheError, match="unknown codec 'zip': this version of kdcli reads bf16, fp32, int4, int8"):
        row_codec("zip")
    with pytest.raises(CacheError, match="codec int8 version 9 is not readable: this kdcli reads 1, 2"):
        row_codec("int8", 9)


def test_container_order_is_by_name() -> None:
    a, b = torch.arange(3), torch.ones(2)
    assert container.pack({"a": a, "b": b}) == container.pack({"b": b, "a": a})
    with pytest.raises(CacheError, match="shard 4"):
        container.unpack(b"x" * 40, "shard 4")
