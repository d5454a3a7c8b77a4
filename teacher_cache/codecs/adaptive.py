"""Entropy coding without tables: every group of symbols brings the frequencies that it has in its own record (the ``pcodec`` library).

Read at several hundred million symbols a second a core, seven times as fast as ``entropy`` reads, and as small where a group has
thousands of symbols, or where a record is not as the calibration rows were. A record of few symbols is smaller under calibrated tables.

Layout: crc32 (uint32) of all that follows; two bytes with which the library says the version of its format; for each group its kind
(uint8: bytes of a symbol) and how long its frequencies and its symbols are (uint32 each); then those, group by group. How many symbols
a group has is not stored: the reader knows, so that no damaged number asks for memory.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec
from pcodec.wrapped import FileCompressor, FileDecompressor

from teacher_cache.errors import CacheError

LEVEL = 8
"""Up to 2⁸ bins a group: 0.1 % above 2¹⁰, 1 % below 2⁶, all as fast."""
LEAST_GROUP = 1 << 12
"""Symbols: the frequencies of a smaller group cost more than those of its neighbours are wrong for it."""
MOST_GROUP = 1 << 22
"""Symbols: the library takes 2²⁴."""
KINDS: dict[int, tuple[str, np.dtype[Any]]] = {2: ("i16", np.dtype("<i2")), 4: ("i32", np.dtype("<i4"))}
"""Bytes of a symbol → its name in the library, and type."""
_CRC, _GROUP, _FORMAT = struct.Struct("<I"), struct.Struct("<BII"), 2
_DAMAGED = "an adaptively coded record is damaged ({}): run `kdcli cache verify`"


def encode(symbols: np.ndarray, counts: Sequence[int]) -> torch.Tensor:
    """uint8 ``[bytes]`` of int16 or int32 symbols ``[N]``.

    Args:
        counts: symbols of each class, in their order: neighbours are of about one scale.
    """
    config = ChunkConfig(
        compression_level=LEVEL,
        mode_spec=ModeSpec.classic(),
        delta_spec=DeltaSpec.no_op(),
        paging_spec=PagingSpec.equal_pages_up_to(MOST_GROUP),
    )
    compressor = FileCompressor()
    heads, bodies = [compressor.write_header()], []
    for part in np.split(symbols, np.cumsum(groups(counts))[:-1]) if len(symbols) else []:
        chunk = compressor.chunk_compressor(np.ascontiguousarray(part), config)
        meta, page = chunk.write_meta(), chunk.write_page(0)
        heads.append(_GROUP.pack(part.itemsize, len(meta), len(page)))
        bodies += [meta, page]
    data = b"".join([*heads, *bodies])
    return torch.frombuffer(bytearray(_CRC.pack(zlib.crc32(data)) + data), dtype=torch.uint8)


def decode(data: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """int16 ``[N]`` of ``encode``, int32 where a group is; CacheError where the bytes are not of such a record with so many symbols."""
    if data.dtype != torch.uint8 or data.ndim != 1:
        raise CacheError(_DAMAGED.format(f"{data.dtype} of {data.ndim} dimensions"))
    raw = data.numpy().tobytes()
    if len(raw) < _CRC.size + _FORMAT or zlib.crc32(memoryview(raw)[_CRC.size :]) != _CRC.unpack_from(raw)[0]:
        raise CacheError(_DAMAGED.format("its checksum"))
    sizes = groups(counts)
    heads = list(_heads(raw, len(sizes)))
    result = np.empty(sum(sizes), dtype=KINDS[max((kind for kind, *_ in heads), default=2)][1])
    start = 0
    try:
        opened, _ = FileDecompressor.new(raw[_CRC.size : _CRC.size + _FORMAT])
        for size, (kind, meta, page) in zip(sizes, heads):
            name, dtype = KINDS[kind]
            into = result[start : start + size]
            whole = into if into.dtype == dtype else np.empty(size, dtype=dtype)
            chunk, read = opened.chunk_decompressor(meta, name)
            done, used = chunk.read_page_into(page, size, whole)
            if (read, used, done.n_processed) != (len(meta), len(page), size):
                raise CacheError(_DAMAGED.format("a group is not as long as it says"))
            if whole is not into:
                into[:] = whole
            start += size
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise CacheError(_DAMAGED.format((str(error).splitlines() or ["pcodec"])[0][:200])) from None
    return torch.from_numpy(result)


def groups(counts: Sequence[int]) -> list[int]:
    """Symbols of each group: classes in their order, joined up to ``LEAST_GROUP``, cut at ``MOST_GROUP``."""
    found: list[int] = []
    size = 0
    for count in counts:
        size += count
        if size >= LEAST_GROUP:
            found += [MOST_GROUP] * (size // MOST_GROUP)
            size %= MOST_GROUP
            if size >= LEAST_GROUP:
                found, size = [*found, size], 0
    return [*found, size] if size else found


def _heads(raw: bytes, count: int) -> Iterator[tuple[int, bytes, bytes]]:
    """(kind, frequencies, symbols) of each group."""
    at, start = _CRC.size + _FORMAT, _CRC.size + _FORMAT + count * _GROUP.size
    if len(raw) < start:
        raise CacheError(_DAMAGED.format(f"it has not the {count} groups of its rows"))
    every = [_GROUP.unpack_from(raw, at + number * _GROUP.size) for number in range(count)]
    if start + sum(meta + page for _, meta, page in every) != len(raw) or not {kind for kind, *_ in every} <= {*KINDS}:
        raise CacheError(_DAMAGED.format("its length"))
    for kind, meta, page in every:
        yield kind, raw[start : start + meta], raw[start + meta : start + meta + page]
        start += meta + page
