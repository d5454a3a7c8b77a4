"""The streaming splitter against ``json.load``, and what it says about files that are no JSON list."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.errors import DataError
from teacher_cache.sources import json_list
from teacher_cache.sources.json_list import split_json_list

TEXT = st.text(alphabet=st.one_of(st.sampled_from('{}[],:"\\ \n\t/u<é日😀\u2028'), st.characters(codec="utf-8")))
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
SPACE = st.sampled_from(["", " ", "\n", "\r\n\t ", "    "])


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(VALUE, max_size=8),
    space=SPACE,
    ascii_only=st.booleans(),
    bom=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_elements_and_offsets_equal_json_load(rows, space, ascii_only, bom, chunk):
    elements = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    text = space + "[" + space + (space + "," + space).join(elements) + space + "]" + space
    data = b"\xef\xbb\xbf" * bom + text.encode("utf-8")
    found = list(split_json_list(io.BytesIO(data), "x.json", chunk))
    assert [json.loads(element) for _, element in found] == rows
    assert all(data[offset : offset + len(element)] == element for offset, element in found)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(VALUE, min_size=1, max_size=5), cut=st.floats(0, 1, exclude_max=True), chunk=st.integers(1, 40))
def test_every_truncation_is_an_error(rows, cut, chunk):
    data = json.dumps(rows, ensure_ascii=False).encode("utf-8")
    with pytest.raises(DataError, match=r"x\.json: unreadable json at row \d+, byte \d+"):
        list(split_json_list(io.BytesIO(data[: int(cut * len(data))]), "x.json", chunk))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), chunk=st.integers(1, 20))
def test_any_bytes_give_elements_or_a_data_error(data, chunk):
    try:
        list(split_json_list(io.BytesIO(b"[" + data), "x.json", chunk))
    except DataError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("data", "row", "byte", "says"),
    [
        (b"", 0, 0, "the file is empty"),
        (b"  \n ", 0, 4, "the file is empty"),
        (b'{"id": 1}', 0, 0, "expected one JSON list"),
        (b"\xff\xfe[\x00", 0, 0, "UTF-16"),
        (b"[", 0, 1, "truncated"),
        (b"[1, 2", 2, 5, "truncated"),
        (b"[1, 2,", 2, 6, "truncated"),
        (b'[1, {"a": "b', 1, 4, "never ends"),
        (b"[1,]", 1, 3, "found ']'"),
        (b"[,1]", 0, 1, "found ','"),
        (b"[1 2]", 1, 3, "expected ',' or ']' after row 0"),
        (b"[1] x", 1, 4, "more text"),
        (b"[1][2]", 1, 3, "more text"),
        (b"[1]\x00", 1, 3, "more text"),
    ],
)
def test_broken_lists_name_row_and_byte(data, row, byte, says):
    with pytest.raises(DataError) as caught:
        list(split_json_list(io.BytesIO(data), "x.json"))
    assert f"row {row}, byte {byte}:" in str(caught.value)
    assert says in str(caught.value)


def test_empty_list():
    assert list(split_json_list(io.BytesIO(b" [ ] "), "x.json", 1)) == []


def test_depth_is_no_limit():
    deep = b"[" * 500_000 + b"]" * 500_000
    assert [element for _, element in split_json_list(io.BytesIO(b"[" + deep + b",1]"), "x", 1 << 16)] == [deep, b"1"]


def test_a_missing_quote_is_reported_before_it_fills_the_memory(monkeypatch):
    monkeypatch.setattr(json_list, "MAX_ROW_BYTES", 10_000)
    stream = io.BytesIO(b'[{"a": 1}, {"a": "no end' + b"x" * 1_000_000)
    with pytest.raises(DataError, match="row 1, byte 11: a row longer than 10,000 bytes"):
        list(split_json_list(stream, "x.json", 1000))
    assert stream.tell() < 50_000
