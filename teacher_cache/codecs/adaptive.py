"""Entropy coding without calibrated tables: every group of symbols has the frequencies of its own record, by zstd's Huffman coder.

Read and written at some five hundred million symbols a second and core, ten times as fast as ``entropy`` reads, and within a few per
cent of its bytes where a group has thousands of symbols; smaller where a record is not as the calibration rows were. Huffman codes have
whole bits, so that common symbols are packed before they are coded: two or four in a byte, and of fours that are mostly zeros the zeros
as bits. Of large symbols the lowest bits, which are noise, are a plane of their own.

One zstd frame (length and checksum) whose plain bytes are: N (uint32); for each group its mode (uint8) and number of escapes (uint32);
then, group by group, its bytes; then the escapes, those of each width together (int8), and those that are no int8 (-128 in their place)
whole (int32). How many symbols a group has is not stored: the reader knows, so that no damaged number asks for memory.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import zstandard

from teacher_cache.codecs import frame
from teacher_cache.errors import CacheError

LEAST_GROUP = 1 << 12
"""Symbols: the frequencies of a smaller group cost more than those of its neighbours are wrong for it."""
WHOLE = -128
"""Of an escape that is no int8."""
_COUNT, _GROUP = struct.Struct("<I"), struct.Struct("<BI")
_DAMAGED = "an adaptively coded record is damaged ({}): run `kdcli cache verify`"
_HUFFMAN = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,  # no symbols worth a match: all are literals
    min_match=7,
    hash_log=6,
    chain_log=6,
    search_log=1,
    window_log=17,
    target_length=0,
    write_content_size=True,
    write_checksum=True,
)


@dataclass(frozen=True)
class Mode:
    """Symbols −limit … limit, ``bits`` each in a byte; −limit − 1 stands for one beyond them, an escape.

    sparse: of bytes that are zero a bit is kept, the others follow. low: that many lowest bits of each symbol follow, in bytes; what is
    said here of symbols is then said of them without those.
    """

    bits: int
    sparse: bool = False
    low: int = 0

    @property
    def limit(self) -> int:
        return (1 << self.bits - 1) - 1

    @property
    def each(self) -> int:
        """Symbols in a byte."""
        return 8 // self.bits


MODES = (Mode(8), Mode(4), Mode(2), Mode(2, sparse=True), *(Mode(8, low=low) for low in range(1, 9)))
NARROWEST_FIRST = (Mode(2), Mode(4), *(Mode(8, low=low) for low in range(9)))
USUAL = {8: (63, 0.01), 4: (7, 0.02), 2: (1, 0.05)}
"""Bits → a size, and the share of larger symbols up to which a group is packed so. Bytes are left when they fill: zstd takes bytes that are
nearly alike for noise and does not code them."""
FOUR_TO_TOP = np.uint32(1 << 24 | 1 << 18 | 1 << 12 | 1 << 6)
"""Times four bytes of two bits each: the four side by side in the highest byte; what falls below meets nothing and carries nothing."""
MOST_ZEROS = 0.3
"""Share of bytes that are zero from which on they are kept as bits."""


def encode(symbols: np.ndarray, counts: Sequence[int]) -> torch.Tensor:
    """uint8 ``[bytes]`` of int16 or int32 symbols ``[N]``, none of them the lowest of its type.

    Args:
        counts: symbols of each class, in their order: neighbours are of about one scale.
    """
    heads, bodies = [], []
    escaped: dict[int, list[np.ndarray]] = {mode.bits: [] for mode in MODES}
    for part in np.split(symbols, np.cumsum(groups(counts))[:-1]) if len(symbols) else []:
        mode, packed, escapes = _pack(part)
        heads.append(_GROUP.pack(MODES.index(mode), len(escapes)))
        bodies += packed
        escaped[mode.bits].append(escapes)
    narrow, wholes = [], []
    for parts in escaped.values():
        each = np.concatenate([np.zeros(0, dtype=np.int32), *parts])
        beyond = np.abs(each) > -WHOLE - 1
        narrow.append(np.where(beyond, WHOLE, each).astype(np.int8).tobytes())
        wholes.append(each[beyond].astype("<i4").tobytes())
    pieces = [_COUNT.pack(len(symbols)) + b"".join(heads), *bodies, *narrow, b"".join(wholes)]
    compressor = zstandard.ZstdCompressor(compression_params=_HUFFMAN).compressobj(size=sum(map(len, pieces)))
    written = []
    for piece in pieces:  # a block of its own, with frequencies of its own unless those of the block before serve
        written += [compressor.compress(piece), compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)] if piece else []
    written.append(compressor.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH))
    return torch.frombuffer(bytearray(b"".join(written)), dtype=torch.uint8)


def _pack(part: np.ndarray) -> tuple[Mode, list[bytes], np.ndarray]:
    """(mode, bytes, escapes int32 less the limit) of one group."""
    size = np.abs(part)
    mode = next((one for one in NARROWEST_FIRST if _fits(one, size)), NARROWEST_FIRST[-1])
    lowest = [(part & (1 << mode.low) - 1).astype(np.uint8).tobytes()] if mode.low else []
    if mode.low:
        part = part >> mode.low
        size = np.abs(part)
    small, escapes = part.astype(np.int8), np.zeros(0, dtype=np.int32)
    if len(beyond := np.flatnonzero(size > mode.limit)):  # few: places are looked for once
        large = part[beyond].astype(np.int32)
        escapes = np.where(large > 0, large - mode.limit - 1, large + mode.limit)
        small[beyond] = -mode.limit - 1
    if mode.bits == 8:
        return mode, [small.tobytes(), *lowest], escapes
    if len(small) % mode.each:
        small = np.concatenate([small, np.zeros(-len(small) % mode.each, dtype=np.int8)])
    if mode.bits == 4:
        two = small.view("<u2") & 0x0F0F
        packed = (two | two >> 4).astype(np.uint8)
        return mode, [packed.tobytes()], escapes
    four = small.view("<u4") & 0x03030303
    four *= FOUR_TO_TOP
    packed = (four >> 24).astype(np.uint8)
    if np.count_nonzero(packed) > (1 - MOST_ZEROS) * len(packed):
        return mode, [packed.tobytes()], escapes
    spoken = packed != 0
    return Mode(2, sparse=True), [np.packbits(spoken, bitorder="little").tobytes(), packed[spoken].tobytes()], escapes


def _fits(mode: Mode, size: np.ndarray) -> bool:
    usual, share = USUAL[mode.bits]
    return int(np.count_nonzero(size > usual << mode.low)) <= share * len(size)


def decode(data: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """int16 ``[N]`` of ``encode``, int32 where one does not fit; CacheError where the bytes are not of so many symbols."""
    sizes = groups(counts)
    if data.dtype != torch.uint8 or data.ndim != 1:
        raise CacheError(_DAMAGED.format(f"{data.dtype} of {data.ndim} dimensions"))
    most = _COUNT.size + _GROUP.size * len(sizes) + 7 * sum(sizes)
    try:
        reader = _Reader(frame.decompress(data.numpy().tobytes(), "symbols", most))
    except CacheError as error:
        raise CacheError(_DAMAGED.format(error)) from None
    if (count := _COUNT.unpack(reader.take(_COUNT.size))[0]) != sum(sizes):
        raise CacheError(_DAMAGED.format(f"{count} symbols where its rows have {sum(sizes)}"))
    heads = [_GROUP.unpack(reader.take(_GROUP.size)) for _ in sizes]
    if any(number >= len(MODES) or escapes > size for (number, escapes), size in zip(heads, sizes)):
        raise CacheError(_DAMAGED.format("a mode or a number of escapes"))
    groups_of = [(MODES[number], *_unpack(reader, MODES[number], size)) for (number, _), size in zip(heads, sizes)]
    escapes = _escapes(reader, [(MODES[number].bits, count) for number, count in heads])
    reader.finish()
    largest = [
        int(np.abs(own.astype(np.int64)).max(initial=0)) + 128 << mode.low
        for (mode, *_), own in zip(groups_of, escapes)
    ]
    result = np.empty(sum(sizes), dtype=np.int16 if max(largest, default=0) < 1 << 15 else np.int32)
    start = 0
    for (mode, part, low), own in zip(groups_of, escapes):
        _restore(mode, part, low, own, result[start : start + len(part)])
        start += len(part)
    return torch.from_numpy(result)


def _escapes(reader: _Reader, heads: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Of each group, int32 less the limit. heads: bits and number of each group's."""
    found: dict[int, np.ndarray] = {}
    for bits in dict.fromkeys(mode.bits for mode in MODES):
        count = sum(number for width, number in heads if width == bits)
        found[bits] = np.frombuffer(reader.take(count), np.int8).astype(np.int32)
    for each in found.values():
        whole = each == WHOLE
        each[whole] = np.frombuffer(reader.take(4 * int(np.count_nonzero(whole))), "<i4")
    own = []
    for bits, count in heads:
        own.append(found[bits][:count])
        found[bits] = found[bits][count:]
    return own


def _restore(mode: Mode, part: np.ndarray, low: np.ndarray | None, escapes: np.ndarray, into: np.ndarray) -> None:
    """A group's symbols."""
    into[:] = part
    beyond = part == -mode.limit - 1
    if np.count_nonzero(beyond) != len(escapes):
        raise CacheError(_DAMAGED.format("escapes and their places"))
    if len(escapes):
        into[beyond] = np.where(escapes >= 0, escapes + (mode.limit + 1), escapes - mode.limit)
    if low is not None:
        into <<= mode.low
        into += low


class _Reader:
    """The plain bytes, from front to back."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        self._at += count
        if self._at > len(self._data):
            raise CacheError(_DAMAGED.format("it ends early"))
        return self._data[self._at - count : self._at]

    def finish(self) -> None:
        if self._at != len(self._data):
            raise CacheError(_DAMAGED.format("it is too long"))


def _unpack(reader: _Reader, mode: Mode, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(int8 ``[size]``, lowest bits uint8 ``[size]``)."""
    count = -(-size // mode.each)
    if mode.sparse:
        spoken = np.unpackbits(np.frombuffer(reader.take(-(-count // 8)), np.uint8), count=count, bitorder="little")
        places = np.flatnonzero(spoken)
        packed = np.zeros(count, dtype=np.uint8)
        packed[places] = np.frombuffer(reader.take(len(places)), np.uint8)
    else:
        packed = np.frombuffer(reader.take(count), np.uint8)
    if mode.bits == 8:
        return packed.view(np.int8), np.frombuffer(reader.take(size), np.uint8) if mode.low else None
    wide = packed.astype(f"<u{mode.each}")
    if mode.bits == 4:
        wide = (wide | wide << 4) & 0x0F0F
    else:
        wide = wide | wide << 12
        wide = (wide | wide << 6) & 0x03030303
    signed = wide.view(np.int8)
    signed ^= mode.limit + 1  # the sign bit spreads over those above it
    signed -= mode.limit + 1
    return signed[:size], None


def groups(counts: Sequence[int]) -> list[int]:
    """Symbols of each group: classes in their order, joined up to ``LEAST_GROUP``."""
    found: list[int] = []
    size = 0
    for count in counts:
        size += count
        if size >= LEAST_GROUP:
            found, size = [*found, size], 0
    return [*found, size] if size else found
