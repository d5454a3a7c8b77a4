"""The index of one tar: a parquet row a sample, with where each of its members lies and a checksum of every one.

With it a reader gets any sample in one range read, knows how many samples there must be (a truncated tar can end silently),
and notices a flipped bit before the bytes reach a tensor.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field

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


def parse_index(data: bytes, place: str) -> list[Entry]:
    """The entries of an index; CacheError naming ``place`` where it is damaged."""
    try:
        table = pq.read_table(io.BytesIO(data))
        if not table.schema.equals(SCHEMA):
            raise ValueError(f"columns {table.schema.names}")
        rows = table.to_pylist()
        return [Entry(**{**row, "members": tuple(Member(**member) for member in row["members"])}) for row in rows]
    except (pa.ArrowException, ValueError, TypeError, KeyError, OSError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CacheError(f"{place}: damaged index ({reason}): run `kdcli cache verify`") from None
