"""LLaVA-NeXT parquet: row groups of any size, nulls, and files that are not what they should be."""

from __future__ import annotations

import os
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.errors import DataError
from teacher_cache.records import Image, Sample, SkipRecord, Turn
from teacher_cache.sources import DataSpec, open_source
from teacher_cache.sources.llava_next_parquet import cut_rows

TALK = [{"from": "human", "value": "<image>\nwhät?"}, {"from": "gpt", "value": "a cat"}]
TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema([("id", pa.string()), ("conversations", TURNS), ("data_source", pa.string()), ("image", IMAGE)])


def row(i=0, image=None, talk=TALK):
    return {"id": f"id{i}", "conversations": talk, "data_source": "vqa", "image": image}


def write(folder, rows, name="a.parquet", row_group_size=1000, schema=SCHEMA):
    path = folder / name
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=row_group_size)
    return str(path)


def test_a_row_as_written(tmp_path):
    path = write(tmp_path, [row(image={"bytes": b"data", "path": "coco/a.jpg"})])
    source = open_source(DataSpec("sft", path))
    (group,) = source.scan(500)
    assert (group.start, group.rows, group.images) == (0, 1, 1)
    turns = (Turn("user", "<image>\nwhät?"), Turn("assistant", "a cat"))
    images = (Image("coco/a.jpg", b"data"),)
    extra = {"data_source": "vqa"}
    assert list(source.read(group)) == [Sample("sft", 0, "id0", "a.parquet row 0", turns, images, extra)]


def test_nulls(tmp_path):
    rows = [
        row(0),
        row(1, {"bytes": None, "path": "x.jpg"}),
        row(2, {"bytes": b"", "path": None}),
        row(3, {"bytes": b"d", "path": None}),
        row(4, talk=None),
        row(5, talk=[]),
        row(6, talk=[None]),
        row(7, talk=[{"from": "human", "value": None}]),
        {"id": None, "conversations": TALK, "data_source": None, "image": None},
    ]
    source = open_source(DataSpec("sft", write(tmp_path, rows)))
    (group,) = source.scan(500)
    read = list(source.read(group))
    assert [r.reason if isinstance(r, SkipRecord) else len(r.images) for r in read] == [
        0,
        "image_missing",
        "image_missing",
        1,
        "bad_row",
        0,
        "bad_row",
        "bad_row",
        0,
    ]
    assert (read[8].source_id, dict(read[8].extra)) == ("", {})


def test_text_that_is_not_utf8_costs_only_its_row(tmp_path):
    bad = pa.array([b"ok", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    struct = pa.StructArray.from_arrays([pa.array(["gpt", "gpt"]), bad], ["from", "value"])
    table = pa.table(
        {
            "id": pa.array(["a", "b"]),
            "conversations": pa.ListArray.from_arrays([0, 1, 2], struct),
            "image": pa.array([None, None], IMAGE),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(DataSpec("sft", str(tmp_path / "a.parquet")))
    first, second = (r for group in source.scan(500) for r in source.read(group))
    assert isinstance(first, Sample)
    assert second.reason == "bad_row"
    assert "UTF-8" in second.detail


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 40),
    size=st.integers(1, 17),
    group_rows=st.integers(1, 20),
    limit=st.none() | st.integers(0, 45),
)
def test_any_row_group_size_gives_every_row_once(tmp_path_factory, count, size, group_rows, limit):
    path = write(tmp_path_factory.mktemp("any"), [row(i) for i in range(count)], row_group_size=size)
    source = open_source(DataSpec("sft", path, limit=limit))
    groups = source.scan(group_rows)
    expected = count if limit is None else min(count, limit)
    assert all(0 < group.rows <= group_rows for group in groups)
    read = [r for group in groups for r in source.read(group)]
    assert [r.source_id for r in read] == [f"id{i}" for i in range(expected)]
    assert sum(group.characters for group in groups) == expected * len("<image>\nwhät?a cat".encode())


def test_small_row_groups_are_joined_and_large_ones_split_evenly():
    assert list(cut_rows([100] * 7, 300, 700)) == [(0, 300), (300, 300), (600, 100)]
    assert list(cut_rows([1000, 200], 500, 1200)) == [(0, 500), (500, 500), (1000, 200)]
    assert list(cut_rows([501], 500, 501)) == [(0, 250), (250, 251)]


def test_a_missing_column_names_file_found_and_expected(tmp_path):
    table = pa.Table.from_pylist([row()], schema=SCHEMA).drop_columns(["conversations"])
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    with pytest.raises(DataError) as caught:
        open_source(DataSpec("sft", str(path))).scan(10)
    message = str(caught.value)
    assert str(path) in message
    assert "found " in message and "data_source: string" in message
    assert "expected conversations: list<struct<from, value>> or messages: list<struct<role, content>>" in message


@pytest.mark.parametrize(("column", "kind"), [("conversations", pa.string()), ("image", pa.int64())])
def test_a_column_of_another_shape_is_an_error(tmp_path, column, kind):
    schema = SCHEMA.set(SCHEMA.get_field_index(column), pa.field(column, kind))
    path = write(tmp_path, [{"id": "a", "conversations": None, "data_source": None, "image": None}], schema=schema)
    with pytest.raises(DataError, match="columns do not fit"):
        open_source(DataSpec("sft", path)).scan(10)


BOTH = {"bytes": b"data", "path": "a.png"}
KINDS = {  # how the images of a row are stored: (type of the column, value, bytes, counted by a scan)
    "bytes alone": (pa.struct([("bytes", pa.binary())]), {"bytes": b"data"}, [b"data"], 1),
    "raw bytes": (pa.binary(), b"data", [b"data"], 1),
    "a path": (pa.string(), "b.png", [b"b"], 1),
    "a path without bytes": (IMAGE, {"bytes": None, "path": "b.png"}, [b"b"], 1),
    "a list": (pa.list_(IMAGE), [BOTH, {"bytes": None, "path": "b.png"}], [b"data", b"b"], 2),
    "a list of paths": (pa.large_list(pa.string()), ["b.png"] * 3, [b"b"] * 3, 3),
    "a list of bytes": (pa.list_(pa.binary()), [b"x", b"y"], [b"x", b"y"], 1),
    "an empty list": (pa.list_(IMAGE), [], [], 0),
    "always null": (pa.null(), None, [], 0),
}


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("kind", KINDS)
def test_images_of_every_kind(tmp_path, kind, column):
    (tmp_path / "b.png").write_bytes(b"b")
    stored, value, images, counted = KINDS[kind]
    schema = pa.schema([("conversations", TURNS), (column, stored)])
    source = open_source(DataSpec("sft", write(tmp_path, [{"conversations": TALK, column: value}], schema=schema)))
    (group,) = source.scan(10)
    (made,) = source.read(group)
    assert [image.data for image in made.images] == images
    assert (group.images, group.characters) == (counted, len("<image>\nwhät?a cat".encode()))


def test_paths_keep_the_rule_of_image_paths(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root").mkdir()
    schema = pa.schema([("conversations", TURNS), ("image", pa.string())])
    names = ["../secret", "/etc/passwd", "none.png", "https://host/a.png"]
    path = write(tmp_path, [{"conversations": TALK, "image": name} for name in names], schema=schema)
    source = open_source(DataSpec("sft", path, image_root=str(tmp_path / "root")))
    reasons = [row.reason for group in source.scan(10) for row in source.read(group)]
    assert reasons == ["image_path_unsafe", "image_path_unsafe", "image_missing", "image_missing"]
    with pytest.raises(DataError, match="pass --image-root"):
        open_source(DataSpec("sft", path, image_root=str(tmp_path / "nowhere"))).scan(10)


PARTS = pa.list_(pa.struct([("type", pa.string()), ("text", pa.string()), ("image", IMAGE)]))
SAID = "<image>\nwhät?", "a cat"
ASKED = [{"type": "image", "text": None, "image": None}, {"type": "text", "text": "whät?", "image": None}]
OWN = [{"type": "image", "text": None, "image": BOTH}, ASKED[1]]
SPOKEN = [("completion", pa.string()), ("image", IMAGE)]
ANSWER = [{"type": "text", "text": "a cat", "image": None}]


def chat_of(kind):
    return pa.list_(pa.struct([("role", pa.dictionary(pa.int8(), pa.string())), ("content", kind)]))


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ([("messages", chat_of(pa.string())), ("image", IMAGE)], {"messages": SAID, "image": BOTH}),
        ([("messages", chat_of(PARTS)), ("images", pa.list_(IMAGE))], {"messages": (ASKED, ANSWER), "images": [BOTH]}),
        ([("messages", chat_of(PARTS))], {"messages": (OWN, ANSWER)}),
        ([("prompt", pa.string()), *SPOKEN], {"prompt": "whät?", "completion": "a cat", "image": BOTH}),
        ([("prompt", chat_of(PARTS)), *SPOKEN], {"prompt": (ASKED,), "completion": "a cat", "image": BOTH}),
    ],
)
def test_the_shapes_of_trl(tmp_path, columns, row):
    """Roles may be categories; a scan counts what is said, not the bytes of an image in a part."""
    roles = ("user", "assistant")
    for name in ("messages", "prompt"):
        if isinstance(row.get(name), tuple):
            row = row | {name: [{"role": role, "content": said} for role, said in zip(roles, row[name])]}
    source = open_source(DataSpec("sft", write(tmp_path, [row], schema=pa.schema(columns))))
    (group,) = source.scan(10)
    (made,) = source.read(group)
    assert (tuple(turn.text for turn in made.turns), made.images[0].data) == (SAID, b"data")
    assert len("whät?a cat".encode()) <= group.characters <= len("".join(SAID).encode())


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_a_truncated_file_is_one_line(tmp_path, keep):
    path = tmp_path / "a.parquet"
    write(tmp_path, [row(i) for i in range(100)])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="unreadable parquet") as caught:
        open_source(DataSpec("sft", str(path))).scan(10)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_reading_streams_within_a_row_group(tmp_path):
    noise = np.random.default_rng(0)
    rows = [row(i, {"bytes": noise.bytes(200_000), "path": "x.jpg"}) for i in range(200)]
    # A page is the least that parquet can decode; pyarrow only looks at a page's size every write_batch_size rows.
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, write_batch_size=8, use_dictionary=False)
    del rows
    assert os.path.getsize(path) > 35e6
    source = open_source(DataSpec("sft", path))
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    tracemalloc.start()
    try:
        groups = source.scan(50)
        arrow_peak = 0
        for group in groups:
            for _ in source.read(group):
                arrow_peak = max(arrow_peak, pool.bytes_allocated() - before)
        python_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(group.rows for group in groups) == 200
    assert arrow_peak < 20e6, f"arrow held {arrow_peak / 1e6:.1f} MB"
    assert python_peak < 5e6, f"python held {python_peak / 1e6:.1f} MB"
