"""Entropy coding: streams of small integers, each with a calibrated table, as one compact byte string.

An ANS coder of the ``constriction`` library over tables of fixed probabilities: within a few per cent of the empirical entropy where
the tables fit, and decoding is a table look-up (tens of millions of symbols a second a core). Tables hold float32 probabilities and
are stored beside the cache, never derived again, so that no machine's ``exp`` decides how bytes are read. Symbols that a table has
no place for are escaped and written whole: a table that fits badly costs bytes, never correctness.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import constriction
import numpy as np
import torch

from teacher_cache.codecs.entropy_tables import Table
from teacher_cache.errors import CacheError, KdcliError

VERSION = 1
_HEADER = struct.Struct("<III")
MOST_ROWS = 1 << 18
MOST_SYMBOLS = 1 << 26
"""Rows and symbols of one record: what a damaged header may ask for before it is refused."""
GROUND = np.array([0x9E3779B9], dtype=np.uint32)
"""What the coder stands on. On nothing, reading too much would end as it should: an empty coder hands out first symbols for ever."""
LONG = 1 << 14
"""Symbols of a stream that is worth a look of its own."""


Stream = tuple[np.ndarray, Table]


def encode(streams: Sequence[Stream], rows: int) -> torch.Tensor:
    """uint8 ``[bytes]`` of all streams; ``rows`` is kept in the header for the reader.

    Layout: rows, number of escapes, number of 32-bit words (uint32 each), escaped symbols (int32), words of the ANS coder (uint32),
    coded upon ``GROUND``.

    Raises:
        KdcliError: more rows or symbols than a reader takes, or a symbol beyond 32 bits.
    """
    if rows > MOST_ROWS or sum(symbols.size for symbols, _ in streams) > MOST_SYMBOLS:
        raise KdcliError(f"a record of {rows} rows is more than a coded field takes: use another codec")
    used = [(symbols.reshape(-1), table) for symbols, table in streams if symbols.size]
    placed = list(_placed(used))
    coder = constriction.stream.stack.AnsCoder(GROUND)
    for places, table, _ in reversed(placed):  # a stack: what is decoded first is encoded last
        coder.encode_reverse(places, table.model)
    words = coder.get_compressed().astype("<u4")
    escapes = np.concatenate([np.zeros(0, dtype=np.int32), *(escaped for *_, escaped in placed)]).astype("<i4")
    data = _HEADER.pack(rows, len(escapes), len(words)) + escapes.tobytes() + words.tobytes()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _placed(streams: Sequence[Stream]) -> Iterator[tuple[np.ndarray, Table, np.ndarray]]:
    """(places in the table int32, table, symbols int32 that it has no place for) of each stream.

    Short streams are looked at together, since a record has dozens of them; a long one by itself, with one number for all its symbols.
    """
    short: list[Stream] = []
    for one, table in streams:
        if len(one) < LONG:
            short.append((one, table))
            continue
        yield from _placed_together(short)
        yield from _placed_together([(one, table)])
        short = []
    yield from _placed_together(short)


def _placed_together(streams: Sequence[Stream]) -> Iterator[tuple[np.ndarray, Table, np.ndarray]]:
    if not streams:
        return
    flat = np.concatenate([one for one, _ in streams]) if len(streams) > 1 else streams[0][0]
    if flat.dtype != np.int32:
        if flat.min() < -(1 << 31) or flat.max() >= 1 << 31:
            raise KdcliError("a value is too large to be coded: use another codec")
        flat = flat.astype(np.int32)
    counts = [len(one) for one, _ in streams] if len(streams) > 1 else [1]
    low, escape = of_each_symbol([table for _, table in streams], counts)
    # Modulo 2³² what lies below a table is far above it, so that one comparison finds both.
    places = flat - low
    np.minimum(places.view(np.uint32), escape.view(np.uint32), out=places.view(np.uint32))
    beyond = places == escape
    some, start = bool(beyond.any()), 0
    for one, table in streams:
        part = slice(start, start + len(one))
        yield places[part], table, flat[part][beyond[part]] if some else flat[:0]
        start += len(one)


class Layout(NamedTuple):
    """How streams that follow one another are read in one go.

    Attributes:
        runs: model and number of symbols of each call of the coder.
        low, escape: int32, of every symbol's table; of the result's shape, or spread over it.
        shape: of the result.
    """

    runs: Sequence[tuple[Any, int]]
    low: np.ndarray
    escape: np.ndarray
    shape: tuple[int, ...]

    @property
    def symbols(self) -> int:
        return math.prod(self.shape)


def layout_of(tables: Sequence[Table], counts: Sequence[int]) -> Layout:
    """Streams of so many symbols each, read as one row of numbers."""
    low, escape = of_each_symbol(tables, counts)
    return Layout([(table.model, count) for table, count in runs(tables, counts)], low, escape, (sum(counts),))


class Columns:
    """Streams of as many symbols each as a record has rows, read as ``[streams, rows]``."""

    def __init__(self, tables: Sequence[Table]):
        self._runs = [(table.model, streams) for table, streams in runs(tables, [1] * len(tables))]
        low, escape = of_each_symbol(tables, [1] * len(tables))
        self._low, self._escape = low[:, None], escape[:, None]

    def layout(self, rows: int) -> Layout:
        each = [(model, streams * rows) for model, streams in self._runs] if rows else []
        return Layout(each, self._low, self._escape, (len(self._low), rows))


def of_each_symbol(tables: Sequence[Table], counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """int32 ``low`` and ``escape`` of every symbol of streams with so many symbols."""
    numbers = np.array([(table.low, table.escape) for table in tables], dtype=np.int32).reshape(-1, 2)
    return np.repeat(numbers[:, 0], counts), np.repeat(numbers[:, 1], counts)


def runs(tables: Sequence[Table], counts: Sequence[int]) -> list[tuple[Table, int]]:
    """Streams of one table that follow one another as one: a call of the coder costs as much as many symbols."""
    joined: list[tuple[Table, int]] = []
    for table, count in zip(tables, counts):
        if joined and joined[-1][0] is table:
            joined[-1] = table, joined[-1][1] + count
        elif count:
            joined.append((table, count))
    return joined


class Decoder:
    """Reads the streams of ``encode`` back, in their order. CacheError where the bytes are not of that layout."""

    def __init__(self, data: torch.Tensor):
        if data.dtype != torch.uint8 or data.numel() < _HEADER.size:
            raise CacheError("a coded record is too short: run `kdcli cache verify`")
        raw = data.numpy().tobytes()
        self.rows, escapes, words = _HEADER.unpack_from(raw)
        if len(raw) != _HEADER.size + 4 * (escapes + words):
            raise CacheError("a coded record differs from the length in its header: run `kdcli cache verify`")
        if self.rows > MOST_ROWS:
            raise CacheError(f"a coded record claims {self.rows} rows: run `kdcli cache verify`")
        self._left = MOST_SYMBOLS
        self._escapes = np.frombuffer(raw, "<i4", escapes, _HEADER.size)
        coded = np.frombuffer(raw, "<u4", words, _HEADER.size + 4 * escapes).astype(np.uint32)
        if words and not coded[-1]:  # what the library would refuse with an error of its own
            raise CacheError("a coded record has an invalid end: run `kdcli cache verify`")
        self._coder = constriction.stream.stack.AnsCoder(coded)

    def promise(self, symbols: int) -> None:
        """So many symbols are still to come: refused before room is made for what a damaged header asks for."""
        if not 0 <= symbols <= self._left:
            raise CacheError(f"a coded record claims {symbols} symbols: run `kdcli cache verify`")

    def take(self, count: int, table: Table) -> np.ndarray:
        """The next ``count`` symbols, int32."""
        one = np.array([table.low], dtype=np.int32), np.array([table.escape], dtype=np.int32)
        return self.take_all(Layout([(table.model, count)] if count else [], *one, (count,)))

    def take_all(self, layout: Layout) -> np.ndarray:
        """The symbols of the next streams, int32, in the layout's shape."""
        total = layout.symbols
        self.promise(total)
        self._left -= total
        if not total:
            return np.zeros(layout.shape, dtype=np.int32)
        decode = self._coder.decode
        if len(layout.runs) == 1:
            places = decode(*layout.runs[0]).reshape(layout.shape)
        else:
            places = np.concatenate([decode(model, count) for model, count in layout.runs]).reshape(layout.shape)
        outside = places == layout.escape
        places += layout.low
        if number := np.count_nonzero(outside):
            if number > len(self._escapes):
                raise CacheError("a coded record lacks escaped symbols: run `kdcli cache verify`")
            places[outside], self._escapes = self._escapes[:number], self._escapes[number:]
        return places

    def finish(self) -> None:
        """Everything must have been read: a record decoded with other tables than it was coded with does not end so."""
        if len(self._escapes) or self._coder.get_compressed().tolist() != GROUND.tolist():
            raise CacheError(
                "a coded record does not end where it should: the calibration is not the one it was made with"
            )


def open_record(stored: Mapping[str, torch.Tensor], place: str) -> Decoder:
    """The decoder of a record's member ``coded``; CacheError naming ``place`` where it has none."""
    if "coded" not in stored:
        raise CacheError(f"{place}: a record holds {sorted(stored)}, nothing coded: run `kdcli cache verify`")
    return Decoder(stored["coded"])
