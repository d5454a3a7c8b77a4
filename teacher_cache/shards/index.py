"""The index of one tar: a parquet row a sample, with where each of its members lies and a checksum of every one.

With it a reader gets any sample in one range read, knows how many samples there must be (a truncated tar can end silently),
and notices a flipped bit before the bytes reach a tensor.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
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
_TEXT = pa.dictionary(pa.int32(), pa.string())
_READ_SCHEMA = pa.schema(
    [("key", _TEXT), *list(SCHEMA)[1:-1], ("members", pa.list_(pa.struct([("ext", _TEXT), *list(MEMBER)[1:]])))]
)


MOST_BYTES, BATCH_ROWS, MOST_BATCH_BYTES, MOST_CHARACTERS = 1 << 30, 256, 1 << 24, 200
"""Of an index, unpacked; rows looked at together, and the bytes of these (a sample takes about 200); of a key or an extension."""
_KEY, _EXT = re.compile(r"[0-9A-Za-z_-]+"), re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.-]*")


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


def parse_index(data: bytes, place: str, tar_bytes: int, rows: int) -> list[Entry]:
    """The entries of an index; CacheError naming ``place`` where it is damaged, or not of a tar of so many bytes and rows."""
    try:
        entries = [_entry(row, tar_bytes) for row in _read_rows(data, rows)]
        if len({entry.key for entry in entries}) != len(entries):
            raise ValueError("a key stands in it twice")
        return entries
    except (pa.ArrowException, ValueError, TypeError, KeyError, OSError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CacheError(f"{place}: damaged index ({reason}): run `kdcli cache verify`") from None


def _read_rows(data: bytes, rows: int) -> Iterator[dict[str, Any]]:
    """A few rows at a time: columns and number of rows are known from the end of the file, before anything is unpacked."""
    # Texts stay the numbers of a dictionary: one long text must not be written out once a row.
    parquet = pq.ParquetFile(io.BytesIO(data), read_dictionary=["key", "members.list.element.ext"], pre_buffer=False)
    if not parquet.schema_arrow.equals(_READ_SCHEMA):
        raise ValueError(f"columns {parquet.schema_arrow.names}")
    if parquet.metadata.num_rows != rows:
        raise ValueError(f"{parquet.metadata.num_rows} samples, not {rows}")
    if sum(parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups)) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES:,} bytes")
    for batch in parquet.iter_batches(BATCH_ROWS):
        texts = [batch.column("key").dictionary, batch.column("members").flatten().field("ext").dictionary]
        longest = max(pc.max(pc.binary_length(one)).as_py() or 0 for one in texts)
        if batch.nbytes > MOST_BATCH_BYTES or longest > MOST_CHARACTERS:
            raise ValueError(f"{batch.nbytes:,} bytes in {batch.num_rows} samples, a text of {longest:,}")
        yield from batch.to_pylist()


def _entry(row: dict[str, Any], tar_bytes: int) -> Entry:
    """ValueError where a value cannot be of a sample, so that none becomes a path or a place outside of the tar."""
    members = tuple(Member(**member) for member in row["members"])
    entry = Entry(**{**row, "members": members})
    numbers = (entry.ordinal, entry.vision_rows, entry.response_rows, entry.text_tokens)
    if any(number is None or number < 0 for number in numbers) or not _KEY.fullmatch(entry.key):
        raise ValueError(f"a sample {str(entry.key)[:60]!r}")
    for one in members:
        if not _EXT.fullmatch(one.ext) or one.crc32 is None or min(one.offset, one.size) < 0:
            raise ValueError(f"a member {str(one.ext)[:60]!r} of {entry.key}")
        if one.offset + one.size > tar_bytes:
            raise ValueError(f"member {one.ext} of {entry.key} reaches beyond the tar")
    if len({one.ext for one in members}) != len(members):
        raise ValueError(f"a member of {entry.key} stands in it twice")
    return entry
