"""Bit packing: the exact bytes of the documented order, every width, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codecs.bits import pack_bits, packed_bytes, unpack_bits, width_of
from teacher_cache.errors import CacheError, KdcliError


def slow_pack(values: list[int], width: int) -> bytes:
    """The definition: value i stands at bit i·width of one large number, written little-endian."""
    whole = sum(value << (index * width) for index, value in enumerate(values))
    return whole.to_bytes(packed_bytes(len(values), width), "little")


def test_exact_bytes() -> None:
    assert pack_bits(torch.tensor([1, 2, 7, 0, 5]), 3).tolist() == [0b11010001, 0b01010001]
    assert pack_bits(np.array([0x12345, 0x3FFFF]), 18).tolist() == [0x45, 0x23, 0xFD, 0xFF, 0x0F]
    assert pack_bits(torch.tensor([0xDEADBEEF]), 32).tolist() == [0xEF, 0xBE, 0xAD, 0xDE]
    assert pack_bits(torch.zeros(0, dtype=torch.int64), 5).shape == (0,)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 32))
def test_any_values_of_any_width(data: st.DataObject, width: int) -> None:
    values = data.draw(st.lists(st.integers(0, (1 << width) - 1), max_size=40))
    packed = pack_bits(torch.tensor(values, dtype=torch.int64), width)
    assert packed.dtype == torch.uint8 and packed.numpy().tobytes() == slow_pack(values, width)
    unpacked = unpack_bits(packed, width, len(values))
    assert unpacked.dtype == torch.int64 and unpacked.tolist() == values


@pytest.mark.parametrize(("value", "width"), [(8, 3), (1 << 18, 18), (1 << 32, 32), (1 << 40, 32), (-1, 32)])
def test_over_wide_values_raise_and_are_never_masked(value: int, width: int) -> None:
    with pytest.raises(KdcliError, match=rf"value {value} does not fit in {width} bits"):
        pack_bits(torch.tensor([0, value, 1]), width)


@pytest.mark.parametrize("width", [0, 33, -1])
def test_widths_are_1_to_32(width: int) -> None:
    with pytest.raises(KdcliError, match=f"1 to 32 bits, not {width}"):
        pack_bits(torch.tensor([0]), width)
    with pytest.raises(KdcliError, match=f"1 to 32 bits, not {width}"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), width, 1)


def test_other_lengths_are_refused() -> None:
    for size in (0, 2, 4):
        with pytest.raises(CacheError, match=rf"{size} bytes do not hold 8 values of 3 bits"):
            unpack_bits(torch.zeros(size, dtype=torch.uint8), 3, 8)
    with pytest.raises(CacheError, match="do not hold"):
        unpack_bits(torch.zeros(3, dtype=torch.int8), 3, 8)


def test_width_of_a_vocabulary() -> None:
    assert [width_of(n) for n in (1, 2, 3, 256, 257, 151_936, 262_145)] == [1, 1, 2, 8, 9, 18, 19]
