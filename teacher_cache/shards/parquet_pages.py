"""How much the pages of a parquet file unpack to, by their own headers: a footer may say less, and pyarrow unpacks a page as its header
says.

A page header is a Thrift struct in the compact protocol: field 2 is the unpacked size, 3 the packed one, and the page follows it.
"""

from __future__ import annotations

import pyarrow.parquet as pq

BINARY, LIST, SET, MAP, STRUCT = 8, 9, 10, 11, 12
FIXED = {1: 0, 2: 0, 3: 1, 7: 8}
"""Type → bytes of a field's value; true and false are types."""
MOST_DEPTH, MOST_GROUPS = 8, 1024


def unpacked_bytes(data: bytes, metadata: pq.FileMetaData) -> int:
    """Of all pages together; ValueError where they are none, or more row groups than an index has."""
    if metadata.num_row_groups > MOST_GROUPS:
        raise ValueError(f"{metadata.num_row_groups:,} row groups")
    total = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in (group.column(i) for i in range(group.num_columns)):
            starts = [column.data_page_offset, column.dictionary_page_offset if column.has_dictionary_page else None]
            start = min(one for one in starts if one)
            total += pages_bytes(data, start, start + column.total_compressed_size)[0]
    return total


def pages_bytes(data: bytes, start: int, stop: int) -> tuple[int, int]:
    """(unpacked bytes, bytes of headers) of the pages from ``start`` to ``stop``; ValueError where they are none."""
    if not 0 <= start <= stop <= len(data):
        raise ValueError("a column reaches beyond the file")
    total = headers = 0
    at = start
    while at < stop:
        header = Header(data, at)
        sizes = header.numbers()
        unpacked, packed = sizes.get(2, -1), sizes.get(3, -1)
        if unpacked < 0 or packed < 0:
            raise ValueError("a page without a size")
        total, headers = total + unpacked, headers + header.at - at
        at = header.at + packed
    return total, headers


class Header:
    """A struct at a place of some bytes. ``at``: where it ends, once it was read."""

    def __init__(self, data: bytes, at: int):
        self.data, self.at = data, at

    def numbers(self) -> dict[int, int]:
        """Whole numbers of the struct by field; everything else is passed over."""
        found: dict[int, int] = {}
        field = 0
        while (head := self._byte()) != 0:
            kind = head & 15
            field = field + (head >> 4) if head >> 4 else self._signed()
            if kind in (4, 5, 6):
                found[field] = self._signed()
            else:
                self._pass(kind, 0)
        return found

    def _pass(self, kind: int, depth: int) -> None:
        if depth > MOST_DEPTH:
            raise ValueError("a page header without end")
        if kind in FIXED:
            self._skip(FIXED[kind])
        elif kind in (4, 5, 6):
            self._varint()
        elif kind == BINARY:
            self._skip(self._varint())
        elif kind == STRUCT:
            while (head := self._byte()) != 0:
                if not head >> 4:
                    self._varint()
                self._pass(head & 15, depth + 1)
        elif kind in (LIST, SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            self._repeat(count, [max(head & 15, 3)], depth)  # true and false are a byte there
        elif kind == MAP:
            if count := self._varint():
                kinds = self._byte()
                self._repeat(count, [kinds >> 4, kinds & 15], depth)
        else:
            raise ValueError(f"a page header with a value of type {kind}")

    def _repeat(self, count: int, kinds: list[int], depth: int) -> None:
        if count > len(self.data):
            raise ValueError("a page header without end")
        for _ in range(count):
            for kind in kinds:
                self._pass(kind, depth + 1)

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise ValueError("a page header is cut off")

    def _byte(self) -> int:
        self._skip(1)
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a page header with an endless number")

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
