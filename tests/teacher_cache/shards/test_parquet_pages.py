"""Sizes of pages are read off the pages themselves, and agree with what an honest footer says."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.errors import CacheError
from teacher_cache.shards.index import Entry, TarMember, dump_index, parse_index
from teacher_cache.shards.parquet_pages import pages_bytes, unpacked_bytes


def index(rows: int) -> bytes:
    entries = [
        Entry(f"{i:09d}-00000000", i, i, 1, 2, (TarMember("json", i, 1, i), TarMember("0.jpg", i, 2, i)))
        for i in range(rows)
    ]
    return dump_index(entries)


def columns_of(data: bytes) -> list[Any]:
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    return [
        metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(metadata.num_columns)
    ]


@pytest.mark.parametrize("rows", [1, 3, 5000])
def test_pages_and_an_honest_footer_agree(rows: int) -> None:
    data = index(rows)
    for column in columns_of(data):
        start = min(one for one in (column.data_page_offset, column.dictionary_page_offset) if one)
        unpacked, headers = pages_bytes(data, start, start + column.total_compressed_size)
        assert unpacked + headers == column.total_uncompressed_size


def test_many_pages_and_statistics() -> None:
    """Whatever else a writer puts into its headers is passed over."""
    table = pa.table({"a": [f"text {i}" for i in range(3000)], "b": [[i, None] for i in range(3000)]})
    stream = io.BytesIO()
    how = {"data_page_size": 512, "data_page_version": "2.0", "write_page_checksum": True, "row_group_size": 1000}
    pq.write_table(table, stream, compression="zstd", write_statistics=True, **how)
    data = stream.getvalue()
    for column in columns_of(data):
        start = min(one for one in (column.data_page_offset, column.dictionary_page_offset) if one)
        unpacked, headers = pages_bytes(data, start, start + column.total_compressed_size)
        assert unpacked + headers == column.total_uncompressed_size


def test_a_page_that_unpacks_to_gigabytes_is_refused_before_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    data = index(5000)
    whole = unpacked_bytes(data, pq.ParquetFile(io.BytesIO(data)).metadata)
    monkeypatch.setattr("teacher_cache.shards.index.MOST_BYTES", whole - 1)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)
    with pytest.raises(CacheError, match=r"here: damaged index \(more than"):
        parse_index(data, "here", 1 << 40, 5000)


@given(st.binary(max_size=60), st.integers(0, 70))
def test_whatever_stands_there(data: bytes, stop: int) -> None:
    with suppress(ValueError):
        assert pages_bytes(data, 0, stop)[0] >= 0
