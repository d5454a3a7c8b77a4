"""The index of one tar: a parquet row a sample, with where each of its members lies and a checksum of every one.

With it a reader gets any sample in one range read, knows how many samples there must be (a truncated tar can end silently),
and notices a flipped bit before the bytes reach a tensor.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from teacher_cache.errors import CacheError
from teacher_cache.shards.parquet_pages import unpacked_bytes

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


MOST_BYTES, BATCH_ROWS, MOST_BATCH_BYTES, MOST_CHARACTERS = 1 << 29, 256, 1 << 24, 200
"""Of an index, unpacked; rows looked at together, and the bytes of these (a sample takes about 200); of a key or an extension."""
_KEY, _EXT = re.compile(r"[0-9A-Za-z_-]+"), re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.-]*")


@dataclass(frozen=True)
class TarMember:
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
    members: tuple[TarMember, ...] = field(default=())


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

    Args:
        table: of ``SCHEMA``, no value missing.

    Raises:
        ValueError: a value cannot be of a sample in a tar of ``tar_bytes``, so that none becomes a path or a place outside of it.
    """

    def __init__(self, table: pa.Table, tar_bytes: int):
        members = table.column("members").combine_chunks()
        flat = members.flatten()
        self._keys = table.column("key").combine_chunks()
        self._numbers = np.stack(
            [table.column(name).to_numpy().astype(np.int64) for name in SCHEMA.names[1:-1]], axis=1
        )
        self._first = members.offsets.to_numpy() - members.offsets[0].as_py() if len(members) else np.zeros(1, np.int64)
        kinds = flat.field("ext").dictionary_encode()
        self._kinds, self._kind = kinds.dictionary.to_pylist(), kinds.indices.to_numpy()
        places = [flat.field(name).to_numpy().astype(np.int64) for name in ("offset", "size", "crc32")]
        self._places = np.stack(places, axis=1)
        self._check(tar_bytes)

    def _check(self, tar_bytes: int) -> None:
        keys = self.keys()
        if not all(map(_KEY.fullmatch, keys)):
            raise ValueError(f"a sample {next(key for key in keys if not _KEY.fullmatch(key))[:60]!r}")
        if (self._numbers < 0).any():
            raise ValueError("a negative number of a sample")
        if not all(map(_EXT.fullmatch, self._kinds)):
            raise ValueError(f"a member {next(ext for ext in self._kinds if not _EXT.fullmatch(ext))[:60]!r}")
        offsets, sizes, _ = self._places.T
        if (
            (offsets < 0).any()
            or (sizes < 0).any()
            or (offsets > tar_bytes).any()
            or (sizes > tar_bytes - offsets).any()
        ):
            raise ValueError("a member reaches beyond the tar")
        of = np.repeat(np.arange(len(keys)), np.diff(self._first))
        if len(set(keys)) != len(keys) or len(np.unique(np.stack([of, self._kind]), axis=1).T) != len(of):
            raise ValueError("a key, or a member of a sample, occurs twice")

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
        ordinal, vision_rows, response_rows, text_tokens = self._numbers[row].tolist()
        return Entry(self.key(row), ordinal, vision_rows, response_rows, text_tokens, self.members(row))

    def key(self, row: int) -> str:
        return self._keys[row].as_py()

    def tokens(self, row: int) -> int:
        """Text and vision tokens of the sample in a row, as the teacher read it."""
        _, vision_rows, _, text_tokens = self._numbers[row].tolist()
        return vision_rows + text_tokens  # type: ignore[no-any-return]

    def members(self, row: int) -> tuple[TarMember, ...]:
        """Of the sample in a row (0 or more), without the rest of its ``Entry``."""
        first, stop = self._first[row : row + 2].tolist()
        kinds = self._kind[first:stop].tolist()
        return tuple(
            TarMember(self._kinds[kind], *place) for kind, place in zip(kinds, self._places[first:stop].tolist())
        )


def parse_index(data: bytes, place: str, tar_bytes: int, rows: int) -> Entries:
    """The entries of an index; CacheError naming ``place`` where it is damaged, or not of a tar of so many bytes and rows."""
    try:
        return Entries(pa.Table.from_batches(list(_read_batches(data, rows)), SCHEMA), tar_bytes)
    except (pa.ArrowException, ValueError, TypeError, KeyError, OSError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CacheError(f"{place}: damaged index ({reason}): run `kdcli cache verify`") from None


def _read_batches(data: bytes, rows: int) -> Iterator[pa.RecordBatch]:
    """A few rows at a time: columns and number of rows are known from the end of the file, before anything is unpacked."""
    # Texts stay the numbers of a dictionary until their lengths are known: one long text must not be written out once a row.
    parquet = pq.ParquetFile(io.BytesIO(data), read_dictionary=["key", "members.list.element.ext"], pre_buffer=False)
    if not parquet.schema_arrow.equals(_READ_SCHEMA):
        raise ValueError(f"columns {parquet.schema_arrow.names}")
    if parquet.metadata.num_rows != rows:
        raise ValueError(f"{parquet.metadata.num_rows} samples, not {rows}")
    if unpacked_bytes(data, parquet.metadata) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES:,} bytes")
    total = 0
    for batch in parquet.iter_batches(BATCH_ROWS):
        if (total := total + batch.nbytes) > MOST_BYTES:  # the footer may say less
            raise ValueError(f"more than {MOST_BYTES:,} bytes")
        lists = batch.column("members")
        flat = lists.flatten()
        if any(column.null_count for column in (*batch.columns, flat, *flat.flatten())):
            raise ValueError("a value is missing")
        key, ext = batch.column("key"), flat.field("ext")
        longest = max(pc.max(pc.binary_length(one.dictionary)).as_py() or 0 for one in (key, ext))
        if batch.nbytes > MOST_BATCH_BYTES or longest > MOST_CHARACTERS:
            raise ValueError(f"{batch.nbytes:,} bytes in {batch.num_rows} samples, a text of {longest:,}")
        plain = pa.StructArray.from_arrays(
            [ext.dictionary_decode(), *(flat.field(one.name) for one in list(MEMBER)[1:])], fields=list(MEMBER)
        )
        offsets = pc.subtract(lists.offsets, lists.offsets[0])
        members = pa.ListArray.from_arrays(offsets, plain)
        yield pa.RecordBatch.from_arrays([key.dictionary_decode(), *batch.columns[1:-1], members], schema=SCHEMA)
