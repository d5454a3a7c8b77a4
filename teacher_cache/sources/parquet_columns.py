"""Which columns of a parquet file hold a row's turns and images, and what a scan learns from them without reading an image's bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from teacher_cache.sources.image_refs import IMAGE_COLUMNS
from teacher_cache.sources.message_rows import COLUMNS, TALK
from teacher_cache.sources.row_limits import UNUSED, media_columns

EXPECTED = (
    "conversations: list<struct<from, value>> or messages: list<struct<role, content>> or prompt and completion; "
    "image or images: struct<bytes, path>, binary or string, or a list of these"
)
_TEXTS = ("value", "content", "text")
"""Fields of turns and parts that hold what is said."""
_SCAN_BATCH_ROWS = 8192


def fits(schema: pa.Schema) -> bool:
    """False where a column that is needed is absent or of another type."""
    kinds = {field.name: field.type for field in schema}
    talks = [kinds[name] for name in TALK[:2] if name in kinds]
    has_talk = bool(talks) or set(TALK[2:]) <= set(kinds)
    turns = all(_is_turns(kind) or pa.types.is_null(kind) for kind in talks)
    images = all(_is_image(kinds[name]) for name in IMAGE_COLUMNS if name in kinds)
    return len(kinds) == len(schema) and has_talk and turns and images


def holds_paths(schema: pa.Schema) -> bool:
    """True where images are paths and nothing else."""
    kinds = [field.type for field in schema if field.name in IMAGE_COLUMNS]
    return any(_is_text(kind.value_type if _is_list(kind) else kind) for kind in kinds)


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


def measure(parquet: pq.ParquetFile, most: int | None) -> tuple[np.ndarray, np.ndarray]:
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


def is_read(field: pa.Field) -> bool:
    """What ``message_rows`` asks for, and scalars, which become ``extra``; others (embeddings) are not even read."""
    asked = field.name in COLUMNS or field.name in TALK or field.name in UNUSED or media_columns([field.name])
    types = pa.types
    tests = (_is_text, types.is_boolean, types.is_integer, types.is_floating)
    return bool(asked) or any(test(field.type) for test in tests)
