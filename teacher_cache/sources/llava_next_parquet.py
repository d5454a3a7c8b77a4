"""Parquet: LLaVA-NeXT-Data (``id, conversations: list<struct<from, value>>, data_source, image: struct<bytes, path>``) and its relatives.

A row is read as in every format (``message_rows``): ``conversations`` or ``messages`` (content text or parts), or ``prompt`` and
``completion``; ``image`` or ``images`` as ``{bytes, path}``, bytes or a path, one or a list; no ``id`` is needed. Paths without bytes
start at the image root.

92 GB in the wild, so a scan reads only text columns and a read opens only the parquet row groups that it needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from teacher_cache.errors import DataError
from teacher_cache.records import RowGroup, Sample, SkipRecord
from teacher_cache.sources import DataSpec, files
from teacher_cache.sources.image_folder import ImageFolder
from teacher_cache.sources.image_refs import IMAGE_COLUMNS
from teacher_cache.sources.message_rows import COLUMNS, TALK, read_row, read_sample
from teacher_cache.sources.row_limits import UNUSED, media_columns
from teacher_cache.sources.row_values import Unparsed

FORMAT = "llava-next-parquet"

_EXPECTED = (
    "conversations: list<struct<from, value>> or messages: list<struct<role, content>> or prompt and completion; "
    "image or images: struct<bytes, path>, binary or string, or a list of these"
)
_TEXTS = ("value", "content", "text")
"""Fields of turns and parts that hold what is said."""
_SCAN_BATCH_ROWS = 8192
_READ_BATCH_ROWS = 32
_BUFFER_BYTES = 1 << 20


def matches(paths: list[str]) -> bool:
    return all(files.first_bytes(path, 4) == b"PAR1" for path in paths)


def open(spec: DataSpec, paths: list[str]) -> LlavaNextParquet:
    root = spec.image_root if spec.image_root is not None else os.path.dirname(paths[0]) or "."
    return LlavaNextParquet(spec, tuple(paths), ImageFolder(root, spec.follow_links))


@dataclass(frozen=True)
class LlavaNextParquet:
    """``teacher_cache.sources.Source`` over one or more parquet files. Holds no open file: any thread may read."""

    spec: DataSpec
    paths: tuple[str, ...]
    images: ImageFolder

    def fingerprint(self) -> dict[str, Any]:
        return files.fingerprint_files(FORMAT, list(self.paths))

    def scan(self, group_rows: int) -> list[RowGroup]:
        """Memory: one batch of text columns, and two numbers a row of one file. Image bytes are not read.

        Raises:
            DataError: not parquet, damaged, or without the expected columns.
        """
        groups: list[RowGroup] = []
        start = 0
        for file, path in enumerate(self.paths):
            most = None if self.spec.limit is None else self.spec.limit - start
            if most == 0:
                break
            with _opened(path) as parquet:
                row_groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
                characters, images = _measure(parquet, most)
            for first, rows in cut_rows(row_groups, group_rows, len(characters)):
                here = slice(first, first + rows)
                locator = {"file": file, "row": first}
                groups.append(
                    RowGroup(start + first, rows, locator, int(characters[here].sum()), int(images[here].sum()))
                )
            start += len(characters)
        return groups

    def read(self, group: RowGroup) -> Iterator[Sample | SkipRecord]:
        """Memory: ``_READ_BATCH_ROWS`` rows with their images, and one parquet page a column (pyarrow puts up to 1024
        rows in a page): never a whole large row group.

        Raises:
            DataError: the file changed since the scan, or is damaged.
        """
        path, first = self.paths[group.locator["file"]], group.locator["row"]
        name, count = os.path.basename(path), 0
        with _opened(path) as parquet:
            for batch in _row_range(parquet, first, group.rows):
                for i in range(batch.num_rows):
                    yield self._sample(batch, i, group.start + count, f"{name} row {first + count}")
                    count += 1
        if count != group.rows:
            raise DataError(f"{path}: {count} rows from row {first} where the scan saw {group.rows}; the file changed")

    def _sample(self, batch: pa.RecordBatch, i: int, ordinal: int, place: str) -> Sample | SkipRecord:
        try:
            row: Any = {name: batch.column(name)[i].as_py() for name in batch.schema.names}
        except UnicodeDecodeError as error:
            row = Unparsed(f"text is not UTF-8 at its byte {error.start}")
        return read_sample(Sample(self.spec.part, ordinal, "", place, ()), row, read_row, self.images.fetch)


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    """A parquet file with the expected columns; whatever pyarrow raises while it is open becomes a DataError."""
    with files.open_binary(path) as stream:
        try:
            # Buffered and not pre-buffered: columns are streamed, or one row group's images would all be in memory.
            parquet = pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            _check_columns(path, parquet.schema_arrow)
            yield parquet
        except (pa.ArrowException, OSError) as error:
            what = " ".join(str(error).split())
            raise DataError(f"{path}: unreadable parquet: {what}; fetch the file again") from error


def _check_columns(path: str, schema: pa.Schema) -> None:
    kinds = {field.name: field.type for field in schema}
    talks = [kinds[name] for name in TALK[:2] if name in kinds]
    fits = len(kinds) == len(schema) and (bool(talks) or set(TALK[2:]) <= set(kinds))
    fits = fits and all(_is_turns(kind) or pa.types.is_null(kind) for kind in talks)
    if not fits or not all(_is_image(kinds[name]) for name in IMAGE_COLUMNS if name in kinds):
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise DataError(
            f"{path}: columns do not fit {FORMAT}: found {found}; expected {_EXPECTED}; rename or convert them"
        )


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_turns(kind: pa.DataType) -> bool:
    turn = kind.value_type if _is_list(kind) else None
    return turn is not None and all(_has_one(turn, names) for names in (("from", "role"), ("value", "content")))


def _has_one(kind: pa.DataType, names: Sequence[str]) -> bool:
    return pa.types.is_struct(kind) and any(kind.get_field_index(name) >= 0 for name in names)


def _is_image(kind: pa.DataType) -> bool:
    kind = kind.value_type if _is_list(kind) else kind
    return pa.types.is_null(kind) or _has_one(kind, ("bytes", "path")) or _is_text(kind) or _is_bytes(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _measure(parquet: pq.ParquetFile, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Of the first ``most`` rows: bytes of text (near enough to characters for balancing) and number of images."""
    schema = parquet.schema_arrow
    talk = next(([name] for name in TALK[:2] if name in schema.names), [name for name in TALK if name in schema.names])
    images = [name for name in IMAGE_COLUMNS if name in schema.names]
    # Paths alone tell null images from present ones without reading their bytes.
    leaves = [parquet.schema.column(i).path for i in range(len(parquet.schema.names))]
    wanted = [leaf for leaf in leaves if leaf.split(".")[0] in (*talk, *images) and _is_small(schema, leaf)]
    lengths: list[np.ndarray] = [np.zeros(0, np.int64)]
    counts: list[np.ndarray] = [np.zeros(0, np.int64)]
    seen = 0
    for batch in parquet.iter_batches(_SCAN_BATCH_ROWS, columns=wanted):
        there = set(batch.schema.names)
        lengths.append(sum((_text_bytes(batch.column(name)) for name in talk), np.zeros(batch.num_rows, np.int64)))
        # An image of which nothing but its bytes tells whether it is there counts as one.
        each = (_counted(batch.column(name)) if name in there else np.ones(batch.num_rows, np.int64) for name in images)
        counts.append(sum(each, np.zeros(batch.num_rows, np.int64)))
        seen += batch.num_rows
        if most is not None and seen >= most:
            break
    return np.concatenate(lengths)[:most], np.concatenate(counts)[:most]


def _is_small(schema: pa.Schema, leaf: str) -> bool:
    """False for the bytes of images, beside the text or in a part of it."""
    if leaf.rpartition(".")[2] == "bytes":
        return False
    kind = schema.field(leaf.split(".")[0]).type
    return not _is_bytes(kind.value_type if _is_list(kind) else kind)


def _text_bytes(column: pa.Array) -> np.ndarray:
    """int64, a number a row: of the column itself, or of what its turns and their parts say."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(column.type):
        return pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if _is_list(column.type):
        owners, inside = pc.list_parent_indices(column).to_numpy(), _text_bytes(column.flatten())
        return np.bincount(owners, weights=inside, minlength=len(column)).astype(np.int64)
    total = np.zeros(len(column), np.int64)
    if pa.types.is_struct(column.type):
        for name in _TEXTS:
            if column.type.get_field_index(name) >= 0:
                total = total + _text_bytes(column.field(name))
    return total


def _counted(column: pa.Array) -> np.ndarray:
    """int64, images a row."""
    if _is_list(column.type):
        return pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return column.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)


def cut_rows(row_groups: list[int], group_rows: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut a file's first ``most`` rows into (first row, rows) of at most ``group_rows``, along parquet row groups.

    Small row groups are joined and large ones split evenly: a read decodes a parquet row group from its beginning,
    so a piece that straddles two would decode both for nothing.
    """
    first = rows = 0
    for size in row_groups:
        pieces = max(1, -(-size // group_rows))
        for piece in range(pieces):
            step = size * (piece + 1) // pieces - size * piece // pieces
            step = min(step, most - first - rows)
            if rows and rows + step > group_rows:
                yield first, rows
                first, rows = first + rows, 0
            rows += step
    if rows:
        yield first, rows


def _is_read(field: pa.Field) -> bool:
    """What ``message_rows`` asks for, and scalars, which become ``extra``; others (embeddings) are not even read."""
    asked = field.name in COLUMNS or field.name in TALK or field.name in UNUSED or media_columns([field.name])
    types = pa.types
    tests = (_is_text, types.is_boolean, types.is_integer, types.is_floating)
    return bool(asked) or any(test(field.type) for test in tests)


def _row_range(parquet: pq.ParquetFile, first: int, rows: int) -> Iterator[pa.RecordBatch]:
    """Batches that hold exactly the file's rows ``first`` … ``first + rows - 1`` (fewer where the file is shorter)."""
    wanted: list[int] = []
    begin = skip = 0
    for i in range(parquet.num_row_groups):
        size = parquet.metadata.row_group(i).num_rows
        if begin < first + rows and begin + size > first:
            skip = first - begin if not wanted else skip
            wanted.append(i)
        begin += size
    columns = [field.name for field in parquet.schema_arrow if _is_read(field)]
    for batch in parquet.iter_batches(_READ_BATCH_ROWS, row_groups=wanted, columns=columns):
        kept = batch.slice(skip, rows)  # slicing beyond the end gives what is there
        skip, rows = max(0, skip - batch.num_rows), rows - kept.num_rows
        yield kept
        if rows == 0:
            return
