"""One zstd frame: what is read is what was written, and nothing large or damaged is believed."""

from __future__ import annotations

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codecs import frame
from teacher_cache.errors import CacheError

DATA = bytes(range(256)) * 20


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=2000), st.sampled_from([1, 3, 19]))
def test_round_trip(data: bytes, level: int) -> None:
    assert frame.decompress(frame.compress(data, level), "here", most=len(data)) == data


def test_length_and_checksum_are_in_the_frame() -> None:
    parameters = zstandard.get_frame_parameters(frame.compress(DATA))
    assert parameters.content_size == len(DATA)
    assert parameters.has_checksum
    assert frame.compress(DATA) == frame.compress(DATA)


def test_bombs_are_refused_before_they_burst() -> None:
    bomb = frame.compress(bytes(1 << 24))
    assert len(bomb) < 2000
    with pytest.raises(CacheError, match="row 7: a compressed frame of 16777216 bytes, at most 1000 are read"):
        frame.decompress(bomb, "row 7", most=1000)


def test_frames_without_a_length_are_refused() -> None:
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(DATA)
    with pytest.raises(CacheError, match="row 7: a compressed frame without its length"):
        frame.decompress(unsized, "row 7")


@pytest.mark.parametrize("at", [0, 5, 12, 200, -1])
def test_any_flipped_byte_is_seen(at: int) -> None:
    damaged = bytearray(frame.compress(DATA))
    damaged[at] ^= 0x10
    with pytest.raises(CacheError, match="row 7: a"):
        frame.decompress(bytes(damaged), "row 7", most=len(DATA))


def test_cut_empty_and_followed_frames_are_damage() -> None:
    whole = frame.compress(DATA)
    for data in (b"", b"nonsense", whole[:-1], whole[:20], whole + b"x", whole + whole):
        with pytest.raises(CacheError, match="row 7: a damaged compressed frame"):
            frame.decompress(data, "row 7")


def test_a_frame_that_understates_its_length_is_damage() -> None:
    """A length of one byte less must not make the reader write beyond it."""
    whole = bytearray(frame.compress(DATA))
    at = whole.index((len(DATA) - 256).to_bytes(2, "little"))  # two-byte lengths are stored less 256
    whole[at : at + 2] = (len(DATA) - 256 - 1).to_bytes(2, "little")
    with pytest.raises(CacheError, match="damaged"):
        frame.decompress(bytes(whole), "row 7")
