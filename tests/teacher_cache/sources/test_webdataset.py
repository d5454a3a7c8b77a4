"""WebDataset tars: which files make a row, and tars that are damaged, cut off, hostile or not what they seem."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.errors import DataError
from teacher_cache.records import Image, Sample, SkipRecord, Turn
from teacher_cache.sources import DataSpec, open_source

TALK = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
LOOK = {"conversations": [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "ho"}]}
TURNS = (Turn("user", "<image>\nhi"), Turn("assistant", "ho"))


def pack(path, members, kind=tarfile.GNU_FORMAT):
    """members: (name, bytes, text or JSON value) or a TarInfo of its own."""
    with tarfile.open(path, "w", format=kind) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            data = (
                data
                if isinstance(data, bytes)
                else data.encode()
                if isinstance(data, str)
                else json.dumps(data).encode()
            )
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def rows_of(path, group_rows=2, **spec):
    source = open_source(DataSpec("sft", path, **spec))
    return [row for group in source.scan(group_rows) for row in source.read(group)]


def only(tmp_path, *members):
    (row,) = rows_of(pack(tmp_path / "a.tar", members))
    return row


def test_a_row_as_written(tmp_path):
    made = only(
        tmp_path, ("dir/0.1.jpg", b"a"), ("dir/0.json", {"id": 7, "family": "x", "nested": {}, "caption": "no", **LOOK})
    )
    assert made == Sample("sft", 0, "7", "a.tar row 0 (dir/0)", TURNS, (Image("dir/0.1.jpg", b"a"),), {"family": "x"})


@pytest.mark.parametrize(
    ("members", "turns", "images"),
    [
        # What img2dataset writes: the json is metadata, the txt the caption.
        (
            [("0.jpg", b"a"), ("0.txt", " a cat\n"), ("0.json", {"caption": "b", "url": "http://x"})],
            ("<image>", "a cat"),
            "a",
        ),
        ([("0.jpg", b"a"), ("0.json", {"caption": "a cat"})], ("<image>", "a cat"), "a"),
        ([("0.json", {"text": "a cat"}), ("0.PNG", b"a")], ("<image>", "a cat"), "a"),
        ([("0.txt", b"\xef\xbb\xbfa cat"), ("0.webp", b"a")], ("<image>", "a cat"), "a"),
        ([("0.0.jpg", b"a"), ("0.1.jpg", b"b"), ("0.txt", "two")], ("<image>\n<image>", "two"), "ab"),
        ([("0.jpg", b"a"), ("0.txt", "no"), ("0.json", LOOK)], ("<image>\nhi", "ho"), "a"),
        ([("0.json", TALK)], ("hi", "ho"), ""),
        ([("0.json", TALK["conversations"])], ("hi", "ho"), ""),
        ([("0.jpg", b"a"), ("0.json", {"prompt": "hi", "completion": "ho"})], ("<image>\nhi", "ho"), "a"),
        ([("0.jpg", b"a"), ("0.json", {"image": "coco/1234.jpg", **LOOK})], ("<image>\nhi", "ho"), "a"),
        ([("0.cls", b"3"), ("0.pyd", b"cos\nsystem\n"), ("0.jpg", b"a"), ("0.json", LOOK)], ("<image>\nhi", "ho"), "a"),
    ],
)
def test_files_that_make_a_row(tmp_path, members, turns, images):
    made = only(tmp_path, *members)
    assert tuple(turn.text for turn in made.turns) == turns
    assert b"".join(image.data for image in made.images).decode() == images


TWO = {"messages": [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "ho"}]}


def test_several_images_by_their_numbers_or_as_the_row_names_them(tmp_path):
    files = [("0.img10.jpg", b"c"), ("0.img9.jpg", b"b"), ("0.jpg", b"a"), ("0.img010.png", b"d")]
    parts = [{"type": "image", "image": f"somewhere/0.{name}.jpg"} for name in ("img10", "img9")]
    for row, expected in (
        (TWO, "abcd"),
        ({**TWO, "images": ["x/0.img10.jpg", "0.img9.jpg"]}, "cb"),
        ({**TWO, "images": ["x/other.jpg", "0.img9.jpg"]}, "abcd"),
        ({"messages": [{"role": "user", "content": parts}, TWO["messages"][1]]}, "cb"),
    ):
        made = only(tmp_path, *files, ("0.json", row))
        assert b"".join(image.data for image in made.images).decode() == expected, row


def test_image_parts_take_the_samples_images(tmp_path):
    for part in ({"type": "image"}, {"type": "image", "image": "elsewhere.jpg"}):
        row = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "hi"}]}, TWO["messages"][1]]}
        made = only(tmp_path, ("0.jpg", b"a"), ("0.json", row))
        assert (made.turns, made.images) == (TURNS, (Image("0.jpg", b"a"),))


def link(name, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("members", "reason", "says"),
    [
        ([("0.jpg", b"a")], "bad_row", "neither json nor txt; are the files of a sample side by side"),
        ([("0.jpg", b"a"), ("0.json", {"url": "x"})], "bad_row", "a json without conversation or caption"),
        ([("0.txt", "a cat")], "image_missing", "a caption without an image"),
        ([("0.json", {"image": "a.jpg", **LOOK})], "image_missing", "no image travels with it"),
        ([("0.jpg", b""), ("0.txt", "a cat")], "image_missing", "is empty"),
        ([("0.jpg", b"a"), ("0.json", b"{")], "bad_row", "is not JSON"),
        ([("0.jpg", b"a"), ("0.json", b"3")], "bad_row", "int, not an object"),
        ([("0.jpg", b"a"), ("0.json", b"[" * 100_000)], "bad_row", "nested too deep"),
        ([("0.jpg", b"a"), ("0.json", b'{"caption": ' + b"9" * 5000 + b"}")], "bad_row", "is not JSON"),
        ([("0.jpg", b"a"), ("0.txt", b"\xff")], "bad_row", "is not UTF-8"),
        ([("0.jpg", b"a"), ("0.json", {"caption": 3})], "bad_row", "the caption is int"),
        ([("0.jpg", b"a"), ("0.jpg", b"b"), ("0.txt", "x")], "bad_row", "two files 'jpg' of one key"),
        ([link("0.jpg"), ("0.txt", "x")], "bad_row", "is a link in the tar"),
        ([link("0.jpg", tarfile.LNKTYPE), ("0.txt", "x")], "bad_row", "is a hard link"),
        ([link("0.jpg", tarfile.CHRTYPE), ("0.txt", "x")], "bad_row", "is a device"),
        ([link("0.jpg", tarfile.FIFOTYPE), ("0.txt", "x")], "bad_row", "is a pipe"),
        ([("0.jpg", b"a"), ("0.json", {"caption": "x", "weight": 0})], "not_for_training", "'weight': 0"),
        ([("0.mp4", b"v"), ("0.txt", "a cat runs")], "media_unsupported", "the sample has '0.mp4'"),
        ([("0.jpg", b"a"), ("0.wav", b"s"), ("0.json", LOOK)], "media_unsupported", "'0.wav'"),
        ([("0.jpg", b"a"), ("0.json", {"caption": "x", "video": "x.mp4"})], "media_unsupported", "'video': 'x.mp4'"),
        ([("0.txt", "x"), *[(f"0.{i}.jpg", b"a") for i in range(1100)]], "bad_row", "more than 1000 files"),
    ],
)
def test_rows_that_cannot_be_used_say_why(tmp_path, members, reason, says):
    made = only(tmp_path, *members)
    assert (type(made), made.reason, made.source_id) == (SkipRecord, reason, "0")
    assert says in made.detail


def test_too_many_bytes_are_a_skip(tmp_path, monkeypatch):
    monkeypatch.setattr("teacher_cache.sources.image_folder.MAX_IMAGE_BYTES", 3)
    monkeypatch.setattr("teacher_cache.sources.webdataset.MAX_ROW_BYTES", 200)
    assert only(tmp_path, ("0.jpg", b"abcd"), ("0.txt", "x")).reason == "image_too_large"
    made = only(tmp_path, ("0.jpg", b"a"), ("0.txt", "x" * 201))
    assert (made.reason, "more than 200" in made.detail) == ("bad_row", True)


def test_what_is_no_sample_is_passed_over_and_keys_may_repeat(tmp_path):
    folder = tarfile.TarInfo("dir")
    folder.type = tarfile.DIRTYPE
    good = [("a.jpg", b"a"), ("a.txt", "x")]
    path = pack(
        tmp_path / "a.tar",
        [
            folder,
            ("README", b"r"),
            *good,
            ("._a.jpg", b"mac"),
            ("dir/.hidden.txt", b"h"),
            ("b.jpg", b"b"),
            ("b.txt", "y"),
            *good,
        ],
    )
    for group_rows in (1, 2, 5):
        rows = rows_of(path, group_rows)
        assert [(row.source_id, row.images[0].data) for row in rows] == [("a", b"a"), ("b", b"b"), ("a", b"a")]
        assert [row.place for row in rows] == ["a.tar row 0 (a)", "a.tar row 1 (b)", "a.tar row 2 (a)"]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_and_names_that_lead_elsewhere(tmp_path, kind):
    """Names are data: nothing is extracted, so none can lead anywhere."""
    names = ["../../etc/passwd", "/abs", "d" * 60 + "/" + "f" * 90, "../x\x1b[2J"]
    names += [] if kind == tarfile.USTAR_FORMAT else ["ä😀" * 60, "d" * 300 + "/x"]
    members = [one for name in names for one in ((f"{name}.jpg", b"a" * 600), (f"{name}.txt", "x"))]
    rows = rows_of(pack(tmp_path / "a.tar", members, kind), 1)
    assert [row.source_id for row in rows] == names
    assert all(row.images[0].data == b"a" * 600 for row in rows)
    assert "\x1b" not in rows[3].place


def test_names_that_are_no_text_are_a_skip(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("\xe9.jpg", "\xe9.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    (row,) = rows_of(str(tmp_path / "a.tar"))
    assert (row.reason, row.source_id.isascii()) == ("bad_row", True)


SAMPLES = [one for i in range(5) for one in ((f"{i}.jpg", b"a" * 700), (f"{i}.txt", f"caption {i}"))]


def test_a_tar_that_is_cut_off_anywhere_is_an_error(tmp_path):
    whole = open_bytes(pack(tmp_path / "a.tar", SAMPLES))
    end = whole.rstrip(b"\0")
    path = tmp_path / "b.tar"
    for cut in [0, 1, 511, 512, 700, 1024, 2048, 2560, len(end) - 3, -(-len(end) // 512) * 512]:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"b\.tar: the tar is cut off.*fetch the tar again"):
            open_source(DataSpec("sft", str(path))).scan(10)
        assert cut > 2560 or len(list(tarfile_members(whole[:cut]))) < 10  # which the standard library does not say


def open_bytes(path):
    with open(path, "rb") as stream:
        return stream.read()


def tarfile_members(data):
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            yield from tar
    except tarfile.ReadError:
        return


def test_a_damaged_header_and_joined_tars_are_errors(tmp_path):
    whole = bytearray(open_bytes(pack(tmp_path / "a.tar", SAMPLES)))
    damaged = tmp_path / "b.tar"
    hit = [at for at in range(0, len(whole), 512) if whole[at : at + 6] == b"1.jpg\0"]
    whole[hit[0] + 1] ^= 1
    damaged.write_bytes(whole)
    with pytest.raises(DataError, match=f"no tar header .* at byte {hit[0]:,}"):
        open_source(DataSpec("sft", str(damaged))).scan(10)
    damaged.write_bytes(open_bytes(tmp_path / "a.tar") * 2)
    with pytest.raises(DataError, match="there is data after the end-of-archive block"):
        open_source(DataSpec("sft", str(damaged))).scan(10)


def test_compressed_tars_are_refused_with_the_program_to_use(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    with pytest.raises(DataError, match=r"a\.tar\.gz is compressed.*unpack it first \(gunzip\)"):
        open_source(DataSpec("sft", str(tmp_path / "a.tar.gz")))


def test_an_empty_tar_and_one_without_its_suffix(tmp_path):
    assert open_source(DataSpec("sft", pack(tmp_path / "a.tar", []))).scan(3) == []
    assert len(rows_of(pack(tmp_path / "shard-0", SAMPLES))) == 5


def test_a_tar_that_changed_after_the_scan_is_refused(tmp_path):
    source = open_source(DataSpec("sft", pack(tmp_path / "a.tar", SAMPLES)))
    group = source.scan(2)[1]
    pack(tmp_path / "a.tar", [("0.jpg", b"a" * 2000), *SAMPLES[1:]])
    with pytest.raises(DataError):
        list(source.read(group))
    pack(tmp_path / "a.tar", [(name.replace("3.", "2."), data) for name, data in SAMPLES])
    with pytest.raises(DataError, match="the tar changed"):
        list(source.read(group))


def test_sparse_files_and_large_headers(tmp_path):
    info = tarfile.TarInfo("0.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    assert "a sparse file" in only(tmp_path, info, ("0.txt", "x")).detail
    info = tarfile.TarInfo("0.jpg")
    info.pax_headers = {"GNU.sparse.major": "1"}
    (row,) = rows_of(pack(tmp_path / "p.tar", [info, ("0.txt", "x")], tarfile.PAX_FORMAT))
    assert "a sparse file" in row.detail
    long = pack(tmp_path / "l.tar", [("d/" * 600_000 + "0.txt", "x")])
    with pytest.raises(DataError, match="extended headers of more than 1,048,576 bytes"):
        open_source(DataSpec("sft", long)).scan(1)


def test_brace_urls_of_a_store(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for i in range(3):
        memory.pipe(f"/wds/x-{i:03d}.tar", open_bytes(pack(tmp_path / "a.tar", SAMPLES)))
    rows = rows_of("memory://wds/x-{000..002}.tar", 4)
    assert [row.ordinal for row in rows] == list(range(15))
    assert {row.place.split()[0] for row in rows} == {"x-000.tar", "x-001.tar", "x-002.tar"}


NAME = st.sampled_from(["a", "b", "a/b", "c.d"])
FILES = st.lists(
    st.tuples(NAME, st.sampled_from(["jpg", "0.jpg", "txt", "json"]), st.binary(max_size=600)), max_size=12
)


@settings(max_examples=60, deadline=None)
@given(members=FILES, group_rows=st.integers(1, 4))
def test_samples_are_runs_of_one_key_whatever_the_groups(tmp_path_factory, members, group_rows):
    path = tmp_path_factory.mktemp("any") / "a.tar"
    pack(path, [(f"{name}.{suffix}", data) for name, suffix, data in members])
    keys = [name.partition(".")[0] if "/" not in name else name for name, _, _ in members]
    runs = [key for i, key in enumerate(keys) if i == 0 or keys[i - 1] != key]
    rows = rows_of(str(path), group_rows)
    assert [row.source_id for row in rows] == runs
    assert rows == rows_of(str(path), 1)


def test_memory_is_a_sample_not_the_tar(tmp_path):
    path = pack(
        tmp_path / "a.tar", [one for i in range(300) for one in ((f"{i}.jpg", b"x" * 100_000), (f"{i}.txt", "y"))]
    )
    source = open_source(DataSpec("sft", path))
    tracemalloc.start()
    try:
        groups = source.scan(500)
        assert sum(1 for group in groups for _ in source.read(group)) == 300
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e6, f"peak {peak / 1e6:.1f} MB"
