"""LLaVA-NeXT-Data parquet: ``id, conversations: list<struct<from, value>>, data_source, image: struct<bytes, path>``.

92 GB in the wild, so a scan reads only text columns and a read opens only the parquet row groups that it needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from teacher_cache.errors import DataError, SkipRow
from teacher_cache.records import Image, RowGroup, Sample, SkipRecord
from teacher_cache.sources import DataSpec, files
from teacher_cache.sources.image_folder import MAX_IMAGE_BYTES
from teacher_cache.sources.llava_rows import extra_of, source_id_of, turns_of

FORMAT = "llava-next-parquet"

_EXPECTED = "id, conversations: list<struct<from, value>>, image: struct<bytes, path>"
_KNOWN = frozenset({"id", "conversations", "image"})
_SCAN_BATCH_ROWS = 8192
_READ_BATCH_ROWS = 32
_BUFFER_BYTES = 1 << 20


def matches(paths: list[str]) -> bool:
    return all(files.first_bytes(path, 4) == b"PAR1" for path in paths)


def open(spec: DataSpec, paths: list[str]) -> LlavaNextParquet:
    return LlavaNextParquet(spec, tuple(paths))


@dataclass(frozen=True)
class LlavaNextParquet:
    """``teacher_cache.sources.Source`` over one or more parquet files. Holds no open file: any thread may read."""

    spec: DataSpec
    paths: tuple[str, ...]

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
        source_id = ""
        try:
            try:
                row = {name: batch.column(name)[i].as_py() for name in batch.schema.names}
            except UnicodeDecodeError as error:
                raise SkipRow("bad_row", f"text is not UTF-8 at its byte {error.start}") from error
            source_id = source_id_of(row["id"])
            turns, extra = turns_of(row["conversations"]), extra_of(row, _KNOWN)
            images = () if row["image"] is None else (_image(row["image"]),)
        except SkipRow as skip:
            return SkipRecord(self.spec.part, ordinal, source_id, place, skip.reason, skip.detail)
        return Sample(self.spec.part, ordinal, source_id, place, turns, images, extra)


def _image(value: dict[str, Any]) -> Image:
    name, data = value["path"] or "", value["bytes"]
    if not data:
        raise SkipRow("image_missing", f"the image's bytes are {'null' if data is None else 'empty'} (path {name!r})")
    if len(data) > MAX_IMAGE_BYTES:
        raise SkipRow("image_too_large", f"the image has {len(data):,} bytes, more than {MAX_IMAGE_BYTES:,}")
    return Image(name, data)


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
    fits = set(schema.names) >= _KNOWN and len(set(schema.names)) == len(schema.names)
    if fits:
        turns, image = schema.field("conversations").type, schema.field("image").type
        is_list = pa.types.is_list(turns) or pa.types.is_large_list(turns)
        fits = is_list and _has_fields(turns.value_type, "from", "value") and _has_fields(image, "bytes", "path")
    if not fits:
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise DataError(
            f"{path}: columns do not fit {FORMAT}: found {found}; expected {_EXPECTED}; rename or convert them"
        )


def _has_fields(kind: pa.DataType, *names: str) -> bool:
    return pa.types.is_struct(kind) and all(kind.get_field_index(name) >= 0 for name in names)


def _measure(parquet: pq.ParquetFile, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Of the first ``most`` rows: bytes of text (near enough to characters for balancing) and number of images."""
    lengths: list[np.ndarray] = [np.zeros(0, np.int64)]
    images: list[np.ndarray] = [np.zeros(0, np.int64)]
    seen = 0
    # ``image.path`` alone tells null images from present ones without reading their bytes.
    for batch in parquet.iter_batches(_SCAN_BATCH_ROWS, columns=["conversations", "image.path"]):
        turns = batch.column("conversations")
        owners = pc.list_parent_indices(turns).to_numpy()
        texts = turns.flatten().field("value")
        sizes = pc.fill_null(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False)
        lengths.append(np.bincount(owners, weights=sizes, minlength=batch.num_rows).astype(np.int64))
        images.append(batch.column("image").is_valid().to_numpy(zero_copy_only=False).astype(np.int64))
        seen += batch.num_rows
        if most is not None and seen >= most:
            break
    return np.concatenate(lengths)[:most], np.concatenate(images)[:most]


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


def _is_scalar(kind: pa.DataType) -> bool:
    """Columns that can become ``extra``; others (a second image, embeddings) are not even read."""
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_boolean, types.is_integer, types.is_floating)
    return any(test(kind) for test in tests)


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
    columns = [field.name for field in parquet.schema_arrow if field.name in _KNOWN or _is_scalar(field.type)]
    for batch in parquet.iter_batches(_READ_BATCH_ROWS, row_groups=wanted, columns=columns):
        kept = batch.slice(skip, rows)  # slicing beyond the end gives what is there
        skip, rows = max(0, skip - batch.num_rows), rows - kept.num_rows
        yield kept
        if rows == 0:
            return
