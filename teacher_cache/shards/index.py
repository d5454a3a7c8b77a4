"""The index of one tar: a parquet row a sample, with where each of its members lies and a checksum of every one.

With it a reader gets any sample in one range read, knows how many samples there must be (a truncated tar can end silently),
and notices a flipped bit before the bytes reach a tensor.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.errors import CacheError

MEMBER = pa.struct([("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("crc32", pa.uint32())])
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("ordinal", pa.int64()),
        ("vision_rows", pa.int32()),
        ("response_rows", pa.int32()),
        ("text_tokens", pa.int32()),
        ("members", pa.list_(MEMBER)),
    ]
)


@dataclass(frozen=True)
class Member:
    ext: str
    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class Entry:
    """One sample of a tar; offsets and sizes in bytes of the member's content."""

    key: str
    ordinal: int
    vision_rows: int
    response_rows: int
    text_tokens: int
    members: tuple[Member, ...] = field(default=())


def dump_index(entries: list[Entry]) -> bytes:
    """Parquet bytes, the same for the same entries."""
    rows = [
        {**{name: getattr(e, name) for name in SCHEMA.names[:-1]}, "members": [vars(m) for m in e.members]}
        for e in entries
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


class Entries(Sequence[Entry]):
    """The samples of one tar in its order, held as columns: some 100 bytes a sample, where Python objects would take ten times that
    in every loader process. An ``Entry`` is made when it is asked for.

    Raises:
        ValueError: a value is missing.
    """

    def __init__(self, table: pa.Table):
        members = table.column("members").combine_chunks()
        flat = members.flatten()
        if any(column.null_count for column in (*table.columns, flat, *flat.flatten())):
            raise ValueError("a value is missing")
        self._keys = table.column("key").combine_chunks()
        self._numbers = np.stack(
            [table.column(name).to_numpy().astype(np.int64) for name in SCHEMA.names[1:-1]], axis=1
        )
        self._first = members.offsets.to_numpy() - members.offsets[0].as_py() if len(members) else np.zeros(1, np.int64)
        kinds = flat.field("ext").dictionary_encode()
        self._kinds, self._kind = kinds.dictionary.to_pylist(), kinds.indices.to_numpy()
        self._places = [flat.field(name).to_numpy() for name in ("offset", "size", "crc32")]

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self) -> list[str]:
        return self._keys.to_pylist()

    @overload
    def __getitem__(self, row: int) -> Entry: ...
    @overload
    def __getitem__(self, row: slice) -> list[Entry]: ...
    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        row = range(len(self))[row]  # negative numbers, and IndexError
        at = slice(self._first[row], self._first[row + 1])
        offsets, sizes, sums = (column[at].tolist() for column in self._places)
        kinds = [self._kinds[kind] for kind in self._kind[at].tolist()]
        stored = tuple(map(Member, kinds, offsets, sizes, sums))
        ordinal, vision_rows, response_rows, text_tokens = self._numbers[row].tolist()
        return Entry(self._keys[row].as_py(), ordinal, vision_rows, response_rows, text_tokens, stored)


def parse_index(data: bytes, place: str) -> Entries:
    """The entries of an index; CacheError naming ``place`` where it is damaged."""
    try:
        table = pq.read_table(io.BytesIO(data))
        if not table.schema.equals(SCHEMA):
            raise ValueError(f"columns {table.schema.names}")
        return Entries(table)
    except (pa.ArrowException, ValueError, TypeError, KeyError, OSError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CacheError(f"{place}: damaged index ({reason}): run `kdcli cache verify`") from None
