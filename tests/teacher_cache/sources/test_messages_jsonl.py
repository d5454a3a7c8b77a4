"""Messages JSONL rows: their shapes, where their images stand, and lines that are no rows."""

from __future__ import annotations

import base64
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.errors import DataError
from teacher_cache.records import Image, Sample, SkipRecord, Turn
from teacher_cache.sources import DataSpec, open_source

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TURNS = (Turn("user", "hi"), Turn("assistant", "ho"))
B64 = base64.b64encode(b"bytes of a").decode()


def write(folder, rows, name="a.jsonl"):
    path = folder / name
    path.write_bytes(rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode())
    return str(path)


def rows_of(path, group_rows=2, **spec):
    source = open_source(DataSpec("sft", path, **spec))
    return [row for group in source.scan(group_rows) for row in source.read(group)]


def only(tmp_path, row, **spec):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    (made,) = rows_of(write(tmp_path, [row]), **spec)
    return made


def asked(content, **columns):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "ho"}], **columns}


PART, TEXT = {"type": "image"}, {"type": "text", "text": "hi"}


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": TALK}, TURNS),
        ({"prompt": "hi", "completion": "ho"}, TURNS),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, TURNS),
        ({"prompt": "hi", "completion": TALK[1:]}, TURNS),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, TURNS),
        ({"conversations": TALK}, TURNS),
        ({"messages": [{"role": "human", "content": "hi"}, {"role": "gpt", "content": "ho"}]}, TURNS),
        ({"messages": [{"role": "system", "content": "be brief"}, *TALK]}, (Turn("system", "be brief"), *TURNS)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, "i"]}, TALK[1]]}, TURNS),
        ({"messages": [{"role": "user", "content": [{"text": "hi"}], "name": None}, TALK[1]], "images": []}, TURNS),
        ({"messages": TALK, "prompt": None, "image": None, "images": None}, TURNS),
    ],
)
def test_shapes_of_a_row(tmp_path, row, turns):
    made = only(tmp_path, {"id": 7, "source": "x", "nested": {}, **row})
    assert made == Sample("sft", 0, "7", "a.jsonl line 1", turns, (), {"source": "x"})


@pytest.mark.parametrize(
    ("row", "text", "images"),
    [
        (asked("<image>\nhi", image="a.png"), "<image>\nhi", "a"),
        (asked("one <image> two <image>", images=["b.png", "a.png"]), "one <image> two <image>", "ba"),
        (asked([PART, TEXT], images=["a.png"]), "<image>\nhi", "a"),
        (asked([TEXT, PART, TEXT], image="a.png"), "hi\n<image>\nhi", "a"),
        (asked([PART, PART, TEXT], images=["a.png", "b.png"]), "<image>\n<image>\nhi", "ab"),
        (asked([{"type": "image", "image": "b.png"}, PART, TEXT], images=["a.png"]), "<image>\n<image>\nhi", "ba"),
        (asked([{"type": "image", "path": "b.png", "text": None}, TEXT]), "<image>\nhi", "b"),
        (asked([{"type": "image", "url": "c.png"}, TEXT]), "<image>\nhi", "c"),
        (asked([{"image": "c.png"}, {"text": "hi"}]), "<image>\nhi", "c"),
        (asked([{"type": "image_url", "image_url": {"url": "a.png"}}, TEXT]), "<image>\nhi", "a"),
        (asked([{"type": "image_url", "image_url": "a.png"}, TEXT]), "<image>\nhi", "a"),
        (asked([{"type": "image", "image": {"bytes": None, "path": "a.png"}}, TEXT]), "<image>\nhi", "a"),
        (asked("hi", images=["a.png", "b.png"]), "<image>\n<image>\nhi", "ab"),  # as TRL places them
        ({"prompt": "hi", "completion": "ho", "image": "a.png"}, "<image>\nhi", "a"),
    ],
)
def test_where_images_stand(tmp_path, row, text, images):
    made = only(tmp_path, row)
    assert made.turns[0] == Turn("user", text)
    assert [image.data.decode() for image in made.images] == list(images)


@pytest.mark.parametrize(
    ("image", "name"),
    [
        (f"data:image/png;base64,{B64}", "inline.png"),
        (f"DATA:image/svg+xml;charset=x;base64,{B64}", "inline.svg+xml"),
        ({"bytes": B64, "path": "some/where.jpg"}, "where.jpg"),
        ({"bytes": B64, "path": None}, "inline"),
    ],
)
def test_images_inside_the_row(tmp_path, image, name):
    for row in (asked("<image>hi", image=image), asked([{"type": "image", "image": image}, TEXT])):
        assert only(tmp_path, row, image_root=str(tmp_path / "nowhere")).images == (Image(name, b"bytes of a"),)


def test_a_file_url_is_a_path_that_may_not_leave_the_root(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    assert only(tmp_path, asked("<image>", image=f"file://{tmp_path}/a.png")).images[0].data == b"a"
    assert only(tmp_path, asked("<image>", image="file:///etc/passwd")).reason == "image_path_unsafe"


@pytest.mark.parametrize(
    ("row", "reason", "says"),
    [
        (asked("<image>", image="https://host/a.png"), "image_missing", "download it"),
        (asked([{"type": "image_url", "image_url": {"url": "http://host/a"}}]), "image_missing", "download it"),
        (asked("<image>", image="s3://bucket/a.png"), "image_missing", "is a web address"),
        (asked("<image>", image="data:,a"), "image_missing", "is a web address"),
        (asked("<image>", image="data:image/png;base64,a$b="), "image_corrupt", "base64"),
        (asked("<image>", image="data:image/png;base64,"), "image_missing", "no bytes"),
        (asked("<image>", image={"bytes": [1, 2]}), "bad_row", "'bytes' of 'image' is list"),
        (asked("<image>", images=[None]), "image_missing", "image 0 of 'images' is null"),
        (asked([PART, PART], images=["a.png"]), "placeholder_mismatch", "2 image parts without a file, 1 images"),
        (asked([{"type": "image", "image": "a.png"}], images=["a.png"]), "placeholder_mismatch", "0 image parts"),
        (asked([PART, {"type": "text", "text": "<image>"}], images=["a.png"]), "placeholder_mismatch", "beside 1"),
        ({"messages": TALK[1:], "image": "a.png"}, "placeholder_mismatch", "no user turn"),
        (asked([{"type": "document"}]), "bad_row", "neither text nor image"),
        (asked([3]), "bad_row", "a part that is int"),
        (asked(None), "bad_row", "'content' of message 0 is absent"),
        (asked([{"type": "text"}]), "bad_row", "'text' in 'content' of message 0 is absent"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "bad_row", "'robot', not one of human, user, gpt"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "bad_row", "user"),
        ({"messages": ["hi"]}, "bad_row", "message 0 is str"),
        ({"messages": "hi"}, "bad_row", "'messages' is str"),
        ({"prompt": "hi"}, "bad_row", "'completion' is absent"),
        ({"completion": "ho"}, "bad_row", "'prompt' is absent"),
        ({"text": "hi"}, "bad_row", "neither 'messages'"),
        ({"conversations": "hi"}, "bad_row", "'conversations' is str"),
    ],
)
def test_rows_that_cannot_be_used_say_why(tmp_path, row, reason, says):
    made = only(tmp_path, {"id": "i", **row})
    assert (type(made), made.reason, made.source_id) == (SkipRecord, reason, "i")
    assert says in made.detail


def test_conversations_keep_llavas_rule(tmp_path):
    """A row without a placeholder for its image is a defect there, and is left for the check to find."""
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "image": "a.png"}
    made = only(tmp_path, row)
    assert made.turns == TURNS
    assert len(made.images) == 1


def test_blank_lines_windows_ends_and_a_byte_order_mark(tmp_path):
    line = json.dumps({"messages": TALK}).encode()
    path = write(tmp_path, b"\xef\xbb\xbf" + line + b"\r\n\r\n \t\n  " + line + b"\r\n" + line)
    for group_rows in (1, 2, 3):
        rows = rows_of(path, group_rows)
        assert [row.turns for row in rows] == [TURNS] * 3
        assert [row.place for row in rows] == ["a.jsonl line 1", "a.jsonl line 4", "a.jsonl line 5"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"messages": [', "no JSON"),
        (b"hello", "no JSON"),
        (b'"\xff"', "not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"n": ' + b"9" * 5000 + b"}", "digits"),
        (b"[]", "list, not an object"),
        (b"null", "NoneType"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    ],
)
def test_a_line_that_is_no_row_costs_only_itself(tmp_path, line, says):
    good = json.dumps({"messages": TALK}).encode()
    rows = rows_of(write(tmp_path, good + b"\n" + line + b"\n" + good))
    assert [type(row) for row in rows] == [Sample, SkipRecord, Sample]
    assert (rows[1].reason, rows[1].place) == ("bad_row", "a.jsonl line 2")
    assert says in rows[1].detail


def test_a_file_that_is_cut_off_is_an_error(tmp_path):
    line = json.dumps({"messages": TALK}).encode()
    path = write(tmp_path, line + b"\n" + line[:-4])
    with pytest.raises(DataError, match=r"a\.jsonl: line 2, the last, is cut off at byte .*fetch the file again"):
        open_source(DataSpec("sft", path)).scan(10)
    assert len(rows_of(path, limit=1)) == 1


@pytest.mark.parametrize("indent", [0, 1, 4])
def test_objects_over_many_lines_are_named_as_such(tmp_path, indent):
    """The file is whole: to fetch it again would not help."""
    rows = [{"messages": TALK, "id": str(i)} for i in range(2)]
    pretty = "\n".join(json.dumps(row, indent=indent) for row in rows).encode()
    later = json.dumps(rows[0]).encode() + b"\n" + pretty
    for data, line in ((pretty, 2), (later, 3), (json.dumps(rows, indent=indent).encode(), 2)):
        path = write(tmp_path, data)
        with pytest.raises(DataError, match=rf"begins before line {line} continues in it: .*jq -c \."):
            open_source(DataSpec("sft", path, format="messages-jsonl")).scan(10)


def test_two_damaged_lines_are_no_object_over_two_lines(tmp_path):
    good = json.dumps({"messages": TALK}).encode()
    rows = rows_of(write(tmp_path, b"\n".join([good, good[:-9], b"hello", good[:-9], good[3:], good])))
    assert [isinstance(row, Sample) for row in rows] == [True, False, False, False, False, True]


def test_a_line_without_end_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("teacher_cache.sources.json_lines.MAX_ROW_BYTES", 3_000_000)
    path = write(tmp_path, b'{"messages": "' + b"x" * 6_000_000)
    with pytest.raises(DataError, match="line 1, at byte 0, is longer than 3,000,000 bytes"):
        open_source(DataSpec("sft", path)).scan(10)


def test_utf16_and_a_file_that_changed_are_refused(tmp_path):
    path = write(tmp_path, [{"messages": TALK}] * 4)
    source = open_source(DataSpec("sft", path))
    group = source.scan(4)[0]
    write(tmp_path, [{"messages": TALK * 2}] * 4)
    with pytest.raises(DataError, match="the file changed"):
        list(source.read(group))
    write(tmp_path, json.dumps({"messages": TALK}).encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        open_source(DataSpec("sft", path, format="messages-jsonl")).scan(4)


def test_the_format_is_found_by_name_or_by_the_first_row(tmp_path):
    row = json.dumps({"messages": TALK}) + "\n"
    named = {"a.jsonl": "{", "b.ndjson": row, "c.json": row, "d": row, "e.jsonl": ""}
    for name, text in named.items():
        (tmp_path / name).write_text(text)
        assert open_source(DataSpec("s", f"{tmp_path}/{name}")).fingerprint()["format"] == "messages-jsonl", name
    for name, text in {"package.json": '{\n"name": "x"\n}', "x.json": '{"a": 1}\n', "y.json": "{" * 100_000}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match="of no known format"):
            open_source(DataSpec("s", f"{tmp_path}/{name}"))


def test_remote_files_and_images(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/mess/a.jsonl", json.dumps(asked("<image>", image="a.png")).encode())
    memory.pipe("/mess/a.png", b"a")
    (row,) = rows_of("memory://mess/a.jsonl")
    assert row.images == (Image("a.png", b"a"),)


LINE = st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"")) | st.just(
    json.dumps({"messages": TALK}).encode()
)


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(LINE, max_size=8), chunk=st.integers(1, 9), ends=st.sampled_from([b"\n", b"\r\n"]))
def test_lines_are_those_of_the_file_whatever_the_chunk(lines, chunk, ends):
    import io

    from teacher_cache.sources.json_lines import split_lines

    data = b"{}" + ends + ends.join(lines)
    found = list(split_lines(io.BytesIO(data), "x", chunk_bytes=chunk))
    expected = [(n, one.strip(b" \t\r")) for n, one in enumerate(data.split(b"\n"), 1) if one.strip(b" \t\r")]
    assert [(number, one) for _, number, one, _ in found] == expected
    assert all(data[offset : offset + len(one)] == one for offset, _, one, _ in found)


def test_memory_is_a_chunk_and_a_line_not_the_group(tmp_path):
    """Rows that hold their images: a group of hundreds of them is never whole in memory."""
    path = tmp_path / "big.jsonl"
    image = base64.b64encode(b"x" * 100_000).decode()
    with path.open("w") as stream:
        for _ in range(300):
            stream.write(json.dumps(asked("<image>hi", image=f"data:image/png;base64,{image}")) + "\n")
    source = open_source(DataSpec("sft", str(path)))
    tracemalloc.start()
    try:
        groups = source.scan(500)
        assert sum(1 for group in groups for _ in source.read(group)) == 300
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 30e6
    assert peak < 6e6, f"peak {peak / 1e6:.1f} MB"
