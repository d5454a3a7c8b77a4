"""Parquet: LLaVA-NeXT-Data (``id, conversations: list<struct<from, value>>, data_source, image: struct<bytes, path>``) and its relatives.

A row is read as in every format (``message_rows``): ``conversations`` or ``messages`` (content text or parts), or ``prompt`` and
``completion``; ``image`` or ``images`` as ``{bytes, path}``, bytes or a path, one or a list; no ``id`` is needed. Paths without bytes
start at the image root.

92 GB in the wild, so a scan reads only text columns and a read opens only the parquet row groups that it needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.errors import DataError
from teacher_cache.records import RowGroup, Sample, SkipRecord
from teacher_cache.sources import DataSpec, files
from teacher_cache.sources.files_and_images import FilesAndImages
from teacher_cache.sources.message_rows import read_row, read_sample
from teacher_cache.sources.parquet_columns import EXPECTED, fits, holds_paths, is_read, measure
from teacher_cache.sources.row_values import Unparsed

FORMAT = "llava-next-parquet"

_READ_BATCH_ROWS = 32
_BUFFER_BYTES = 1 << 20


def matches(paths: list[str]) -> bool:
    return all(files.first_bytes(path, 4) == b"PAR1" for path in paths)


def open(spec: DataSpec, paths: list[str]) -> LlavaNextParquet:
    return LlavaNextParquet.of(spec, paths)


class LlavaNextParquet(FilesAndImages):
    """``teacher_cache.sources.Source`` over one or more parquet files."""

    FORMAT = FORMAT

    def scan(self, group_rows: int) -> list[RowGroup]:
        """Memory: one batch of text columns, and two numbers a row of one file. Image bytes are not read.

        Raises:
            DataError: not parquet, damaged, without the expected columns, or images are paths and there is no image root.
        """
        groups: list[RowGroup] = []
        start = 0
        for file, path in enumerate(self.paths):
            most = None if self.spec.limit is None else self.spec.limit - start
            if most == 0:
                break
            with _opened(path) as parquet:
                if holds_paths(parquet.schema_arrow):
                    self.images.check()
                row_groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
                characters, images = measure(parquet, most)
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
            if not fits(parquet.schema_arrow):
                found = ", ".join(f"{field.name}: {field.type}" for field in parquet.schema_arrow)
                what = f"columns do not fit {FORMAT}: found {found}; expected {EXPECTED}; rename or convert them"
                raise DataError(f"{path}: {what}")
            yield parquet
        except (pa.ArrowException, OSError) as error:
            what = " ".join(str(error).split())
            raise DataError(f"{path}: unreadable parquet: {what}; fetch the file again") from error


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
    columns = [field.name for field in parquet.schema_arrow if is_read(field)]
    for batch in parquet.iter_batches(_READ_BATCH_ROWS, row_groups=wanted, columns=columns):
        kept = batch.slice(skip, rows)  # slicing beyond the end gives what is there
        skip, rows = max(0, skip - batch.num_rows), rows - kept.num_rows
        yield kept
        if rows == 0:
            return
