"""LLaVA json rows: their shape, their images, and bounded memory."""

from __future__ import annotations

import base64
import json
import os
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.errors import DataError
from teacher_cache.records import Image, Sample, SkipRecord, Turn
from teacher_cache.sources import DataSpec, open_source

TALK = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]


def write(folder, rows, name="a.json"):
    path = folder / name
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(path)


def rows_of(path, group_rows=2, **spec):
    source = open_source(DataSpec("sft", path, **spec))
    return [row for group in source.scan(group_rows) for row in source.read(group)]


def test_a_row_as_written(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "ä 1.jpg").write_bytes(b"not checked here")
    row = {
        "id": 7,
        "image": "coco/ä 1.jpg",
        "conversations": [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": "<image>\nwhat? 😀", "weight": 1},
            {"from": "gpt", "value": "a cat"},
        ],
        "family": "vqa",
        "score": 0.5,
        "nested": {"left": "out"},
        "nothing": None,
    }
    (sample,) = rows_of(write(tmp_path, [row]))
    turns = (Turn("system", "be brief"), Turn("user", "<image>\nwhat? 😀"), Turn("assistant", "a cat"))
    images = (Image("coco/ä 1.jpg", b"not checked here"),)
    assert sample == Sample("sft", 0, "7", "a.json row 0", turns, images, {"family": "vqa", "score": 0.5})


@pytest.mark.parametrize("image", ["absent", None, "", []])
def test_text_only_rows(tmp_path, image):
    row = {"id": "t", "conversations": TALK} | ({} if image == "absent" else {"image": image})
    (sample,) = rows_of(write(tmp_path, [row]), image_root=str(tmp_path / "no such folder"))
    assert sample.images == ()


def test_several_images_keep_their_order(tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    (sample,) = rows_of(write(tmp_path, [{"id": "m", "image": ["c", "a", "b"], "conversations": TALK}]))
    assert [image.data for image in sample.images] == [b"c", b"a", b"b"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("null", "NoneType"),
        ("3", "int"),
        ('"row"', "str"),
        ("[]", "list"),
        ("{}", "neither 'messages' nor 'conversations'"),
        ('{"question": "a", "answer": "b"}', "it has 'question', 'answer'"),
        ('{"conversations": "hi"}', "not a list"),
        ('{"conversations": ["hi"]}', "turn 0 is str"),
        ('{"conversations": [{"from": "human"}]}', "'value' of turn 0 is absent"),
        ('{"conversations": [{"from": "human", "value": 3}]}', "'value' of turn 0 is int"),
        ('{"conversations": [{"from": "robot", "value": ""}]}', "'robot'"),
        ('{"conversations": [{"from": ["human"], "value": ""}]}', "human"),
        ('{"conversations": [], "image": 3}', "'image' is int"),
        ('{"conversations": [], "id": {}}', "'id' is dict"),
        ('{"conversations": [{"from": "gpt", "value": "\\ud800"}]}', "surrogate"),
        ('{"conversations": [], "image": "\\udfff.jpg"}', "surrogate"),
        ('{"conversations": [], "x": ' + "9" * 5000 + "}", "digits"),
        ('{"conversations": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
    ],
)
def test_rows_of_the_wrong_shape_cost_only_themselves(tmp_path, row, says):
    good = json.dumps({"id": "good", "conversations": TALK})
    rows = rows_of(write(tmp_path, f"[{good}, {row}, {good}]"))
    assert [type(r) for r in rows] == [Sample, SkipRecord, Sample]
    assert rows[1].reason == "bad_row"
    assert says in rows[1].detail
    assert (rows[1].ordinal, rows[1].place) == (1, "a.json row 1")


def test_odd_but_legal_values(tmp_path):
    row = '{"id": 1e999, "conversations": [], "big": 1' + "0" * 400 + ', "nan": NaN, "inf": -1e999, "yes": true}'
    (sample,) = rows_of(write(tmp_path, f"[{row}]"))
    assert sample.extra == {"big": 10**400, "yes": True}


def test_answers_are_the_one_list_that_a_row_keeps(tmp_path):
    """Texts, numbers, VQA's objects; anything else under that name is left out like every nested value."""
    vqa = [{"answer": "two", "answer_confidence": "yes"}, {"answer": "2"}]
    columns = [["a", 2, 1.5], vqa, "one", [], [["a"]], [{"text": "a"}], {"answer": "a"}]
    rows = [{"id": "x", "conversations": TALK, "answers": value, "tags": ["a"]} for value in columns]
    kept = [row.extra.get("answers") for row in rows_of(write(tmp_path, json.dumps(rows)))]
    assert kept == [["a", "2", "1.5"], ["two", "2"], "one", None, None, None, None]
    bad = '[{"conversations": [], "answers": ["\\ud800"]}]'
    (skip,) = rows_of(write(tmp_path, bad))
    assert skip.reason == "bad_row" and "'answers' holds half of a surrogate pair" in skip.detail


def test_bytes_that_are_not_utf8_cost_only_their_row(tmp_path):
    good = json.dumps({"id": "good", "conversations": TALK}).encode()
    (tmp_path / "a.json").write_bytes(b"[" + good.replace(b"hi", b"h\xe9") + b"," + good + b"]")
    bad, fine = rows_of(str(tmp_path / "a.json"))
    assert (bad.reason, bad.detail) == ("bad_row", f"not UTF-8 at byte {1 + good.index(b'hi') + 1}")
    assert isinstance(fine, Sample)


def test_broken_json_names_file_row_and_byte(tmp_path):
    text = '[{"id": "ä", "conversations": []}, {"id": tru}]'
    path = write(tmp_path, text)
    with pytest.raises(DataError) as caught:
        open_source(DataSpec("sft", path)).scan(10)
    byte = len(text[: text.index("tru}")].encode())
    assert str(caught.value).startswith(f"{path}: unreadable json at row 1, byte {byte}: Expecting value; ")


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_file_is_an_error(tmp_path, empty):
    with pytest.raises(DataError, match="the file is empty"):
        open_source(DataSpec("sft", write(tmp_path, empty))).scan(10)


def test_zero_rows_are_zero_groups(tmp_path):
    assert open_source(DataSpec("sft", write(tmp_path, "[]"))).scan(10) == []


def test_a_file_that_changed_after_the_scan_is_refused(tmp_path):
    path = write(tmp_path, [{"id": str(i), "conversations": TALK} for i in range(4)])
    source = open_source(DataSpec("sft", path))
    group = source.scan(4)[0]
    write(tmp_path, [{"id": str(i), "conversations": TALK * 3} for i in range(4)])
    with pytest.raises(DataError, match="changed"):
        list(source.read(group))


def image_row(name):
    return {"id": "i", "image": name, "conversations": TALK}


@pytest.fixture
def root(tmp_path):
    """An image root with traps: links, a pipe, an empty file; and a secret beside it."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.txt").write_bytes(b"secret")
    (tmp_path / "root-twin").mkdir()
    (tmp_path / "root-twin" / "x.jpg").write_bytes(b"secret")
    (root / "sub" / "a.jpg").write_bytes(b"a")
    (root / "empty.jpg").write_bytes(b"")
    (root / "inner-link.jpg").symlink_to("sub/a.jpg")
    (root / "outer-link.jpg").symlink_to("../secret.txt")
    (root / "outer-folder").symlink_to("..")
    (root / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(root / "pipe.jpg")
    return root


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.txt", "image_path_unsafe"),
        ("sub/../../secret.txt", "image_path_unsafe"),
        ("../root-twin/x.jpg", "image_path_unsafe"),
        ("/etc/passwd", "image_path_unsafe"),
        ("/dev/zero", "image_path_unsafe"),
        ("outer-link.jpg", "image_path_unsafe"),
        ("outer-folder/secret.txt", "image_path_unsafe"),
        ("a\0b.jpg", "image_path_unsafe"),
        ("absent.jpg", "image_missing"),
        ("sub/a.jpg/b.jpg", "image_missing"),
        ("sub", "image_missing"),
        (".", "image_missing"),
        ("pipe.jpg", "image_missing"),
        ("loop.jpg", "image_missing"),
        ("empty.jpg", "image_missing"),
        ("x" * 300 + ".jpg", "image_missing"),
    ],
)
def test_images_that_must_not_or_cannot_be_read(tmp_path, root, name, reason):
    (row,) = rows_of(write(tmp_path, [image_row(name)]), image_root=str(root))
    assert (type(row), row.reason, row.source_id) == (SkipRecord, reason, "i")
    assert "\0" not in row.detail


def test_images_that_no_folder_holds(tmp_path):
    """Bytes in the row are read; addresses are named as such, and so are paths that only look right."""
    (tmp_path / "a.png").write_bytes(b"a")
    text = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0" * 40).decode()
    for inside in (f"data:image/png;base64,{text}", text, {"bytes": text, "path": None}):
        (made,) = rows_of(write(tmp_path, [image_row(inside)]))
        assert made.images[0].data == base64.b64decode(text)
    (made,) = rows_of(write(tmp_path, [image_row(f"file://{tmp_path}/a.png")]))
    assert made.images[0].data == b"a"
    for name, reason, says in (
        ("https://host/a.png", "image_missing", "is a web address"),
        ("file:///etc/passwd", "image_path_unsafe", "--image-root is the folder that a path must be below"),
        ("/etc/passwd", "image_path_unsafe", "--image-root is the folder that a path must be below"),
        (".\\a.png", "image_missing", "folders are parted by /"),
        (" a.png", "image_missing", "mind the blanks"),
        (f"data:video/mp4;base64,{text}", "media_unsupported", "data:video"),
        (["a.png", None], "image_missing", "image 1 of 'image' is null"),
        (f"data:image/png;base64,{text[:-2]}", "image_corrupt", "base64"),
    ):
        (skip,) = rows_of(write(tmp_path, [image_row(name)]))
        assert (skip.reason, says in skip.detail, skip.source_id) == (reason, True, "i"), skip


def test_memory_is_a_row_where_rows_hold_their_images(tmp_path):
    text = base64.b64encode(b"\xff\xd8\xff" + b"\0" * 100_000).decode()
    path = tmp_path / "big.json"
    path.write_text(json.dumps([image_row(f"data:image/jpeg;base64,{text}")] * 300))
    source = open_source(DataSpec("sft", str(path)))
    groups = source.scan(300)
    tracemalloc.start()
    try:
        assert sum(1 for group in groups for _ in source.read(group)) == 300
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 30e6
    assert peak < 10e6, f"peak {peak / 1e6:.1f} MB"


@pytest.mark.parametrize("name", ["sub/a.jpg", "sub/../sub/a.jpg", "./sub//a.jpg", "inner-link.jpg"])
def test_paths_that_stay_inside_the_root(tmp_path, root, name):
    (row,) = rows_of(write(tmp_path, [image_row(name)]), image_root=str(root))
    assert row.images == (Image(name, b"a"),)


def test_one_absent_image_root_is_one_error_before_reading(tmp_path):
    path = write(tmp_path, [image_row("a.jpg")])
    with pytest.raises(DataError, match="pass --image-root"):
        open_source(DataSpec("sft", path, image_root=str(tmp_path / "nowhere"))).scan(10)


def test_a_remote_image_root(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/images/a.jpg", b"a")
    memory.pipe("/bucket/secret", b"secret")
    path = write(tmp_path, [image_row(name) for name in ("a.jpg", "../secret", "b.jpg")])
    rows = rows_of(path, image_root="memory://bucket/images")
    assert rows[0].images == (Image("a.jpg", b"a"),)
    assert [row.reason for row in rows[1:]] == ["image_path_unsafe", "image_missing"]


TEXT = st.text(alphabet=st.one_of(st.sampled_from('{}[],:"\\ \né日😀'), st.characters(codec="utf-8")), max_size=30)
ROW = st.fixed_dictionaries(
    {"id": TEXT, "conversations": st.lists(st.fixed_dictionaries({"from": st.just("gpt"), "value": TEXT}), max_size=3)},
    optional={"note": TEXT},
)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(ROW, max_size=9), group_rows=st.integers(1, 5), indent=st.sampled_from([None, 1]))
def test_scan_and_read_equal_json_load(tmp_path_factory, rows, group_rows, indent):
    path = tmp_path_factory.mktemp("any") / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
    source = open_source(DataSpec("sft", str(path)))
    groups = source.scan(group_rows)
    read = [row for group in groups for row in source.read(group)]
    assert [row.source_id for row in read] == [row["id"] for row in rows]
    assert [[turn.text for turn in row.turns] for row in read] == [
        [turn["value"] for turn in row["conversations"]] for row in rows
    ]
    assert [dict(row.extra) for row in read] == [{k: row[k] for k in row.keys() & {"note"}} for row in rows]
    assert sum(group.characters for group in groups) == sum(len(turn.text) for row in read for turn in row.turns)


def test_memory_is_a_chunk_and_a_group_not_the_file(tmp_path):
    path = tmp_path / "big.json"
    row = json.dumps({"id": "x", "conversations": [{"from": "gpt", "value": "blah " * 2000}]})
    with path.open("w") as stream:
        stream.write("[" + row)
        stream.writelines("," + row for _ in range(3000))
        stream.write("]")
    assert path.stat().st_size > 30e6
    source = open_source(DataSpec("sft", str(path)))
    tracemalloc.start()
    try:
        groups = source.scan(50)
        count = sum(1 for group in groups for _ in source.read(group))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 3001
    assert peak < 6e6, f"peak {peak / 1e6:.1f} MB"
