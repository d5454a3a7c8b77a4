"""From what the user typed to the files and the format."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teacher_cache.errors import DataError
from teacher_cache.sources import DataSpec, open_source, source_modules
from teacher_cache.sources.files import expand_paths

ROW = {"id": "a", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}


def touch(folder, *names, content="[]"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def names(paths):
    return [os.path.basename(path) for path in paths]


def test_globs_and_braces_are_sorted(tmp_path):
    touch(tmp_path, "x-002.json", "x-000.json", "x-001.json", "y.json", "sub/z.json")
    (tmp_path / "x-dir.json").mkdir()
    assert names(expand_paths(f"{tmp_path}/x-*.json")) == ["x-000.json", "x-001.json", "x-002.json"]
    assert names(expand_paths(f"{tmp_path}/x-{{000..002}}.json")) == ["x-000.json", "x-001.json", "x-002.json"]
    assert names(expand_paths(f"{tmp_path}/x-{{2..0}}.json".replace("{", "00{"))) == names(
        expand_paths(f"{tmp_path}/x-*.json")
    )
    assert names(expand_paths(f"{tmp_path}/{{y,x-*,y}}.json")) == ["x-000.json", "x-001.json", "x-002.json", "y.json"]
    assert names(expand_paths(f"{tmp_path}/**/z.json")) == ["z.json"]
    assert names(expand_paths(f"file://{tmp_path}/y.json")) == ["y.json"]


def test_relative_paths_and_names_that_look_like_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "a.json", "a[1]{b}.json")
    assert expand_paths("a.json") == expand_paths("{a.json,*n,?.json}")[:1] == ["a.json"]
    assert len(expand_paths("{a.json,*n,?.json}")) == 2
    assert expand_paths("a[1]{b}.json") == ["a[1]{b}.json"]
    assert open_source(DataSpec("sft", "a.json")).images.root == "."


def test_remote_files(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for i in range(2):
        memory.pipe(f"/mix/x-{i}.json", json.dumps([ROW] * (i + 1)).encode())
    for pattern in ("memory://mix/x-*.json", "memory://mix/x-{0..1}.json"):
        source = open_source(DataSpec("sft", pattern))
        assert [row.place for group in source.scan(10) for row in source.read(group)] == [
            "x-0.json row 0",
            "x-1.json row 0",
            "x-1.json row 1",
        ]
    with pytest.raises(DataError, match="no such file"):
        open_source(DataSpec("sft", "memory://mix/none.json"))


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("none.json", "no such file; check the path"),
        ("none-*.json", "no file matches"),
        ("x-{0..2}.json", r"x-2\.json: no such file \(named by .*x-\{0\.\.2\}\.json\)"),
        ("folder", "is a folder; name its files"),
        ("x-{0.json", "unbalanced braces"),
    ],
)
def test_missing_files_name_the_path_and_the_fix(tmp_path, pattern, says):
    touch(tmp_path, "x-0.json", "x-1.json", "folder/a.json")
    with pytest.raises(DataError, match=says) as caught:
        open_source(DataSpec("sft", f"{tmp_path}/{pattern}"))
    assert str(tmp_path) in str(caught.value)


def test_the_format_is_found_from_the_content_or_refused_with_the_valid_ones(tmp_path):
    touch(tmp_path, "a.json", content=json.dumps([ROW]))
    touch(tmp_path, "list-without-suffix", content="\ufeff \n[")
    touch(tmp_path, "notes.txt", content="hello")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "b.parquet")
    assert open_source(DataSpec("s", f"{tmp_path}/a.json")).fingerprint()["format"] == "llava-json"
    assert open_source(DataSpec("s", f"{tmp_path}/list-without-suffix")).fingerprint()["format"] == "llava-json"
    assert open_source(DataSpec("s", f"{tmp_path}/b.parquet")).fingerprint()["format"] == "llava-next-parquet"
    for pattern in ("notes.txt", "{a.json,b.parquet}"):
        with pytest.raises(DataError) as caught:
            open_source(DataSpec("s", f"{tmp_path}/{pattern}"))
        assert all(name in str(caught.value) for name in source_modules())


WHOLE = json.dumps([ROW]).encode()
FOREIGN = {
    "a.json": (WHOLE.decode().encode("utf-16"), r"UTF-16; save it as UTF-8 \(`iconv"),
    "b.jsonl": (json.dumps(ROW).encode("utf-16-le"), "UTF-16; save it as UTF-8"),
    "c.json": (WHOLE.decode().encode("utf-16-be"), "UTF-16; save it as UTF-8"),
    "d.json": (WHOLE.decode().encode("utf-32"), "UTF-32; save it as UTF-8"),
    "e.json.gz": (gzip.compress(WHOLE), r"is compressed.*unpack it first \(gunzip\)"),
    "f.jsonl.bz2": (bz2.compress(WHOLE), r"is compressed.*\(bunzip2\)"),
    "g.json": (lzma.compress(WHOLE), r"is compressed.*\(unxz\)"),
    "h.jsonl.zst": (b"\x28\xb5\x2f\xfd\0", r"is compressed.*\(unzstd\)"),
    "i.zip": (b"PK\x03\x04\0", r"is compressed.*\(unzip\)"),
    "m.arrow": (b"\xff\xff\xff\xff\0", "an Arrow stream.*write it as parquet"),
    "j.arrow": (b"ARROW1\0\0", "an Arrow file: write it as parquet"),
    "k.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer, not the data"),
    "l.json": (b"<!DOCTYPE html><html>", "a web page, not data"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_no_reader_takes_say_what_they_are(tmp_path, name):
    data, says = FOREIGN[name]
    (tmp_path / name).write_bytes(data)
    for given in (None, "llava-json", "messages-jsonl"):
        with pytest.raises(DataError, match=says) as caught:
            open_source(DataSpec("s", f"{tmp_path}/{name}", format=given))
        assert f"{tmp_path}/{name}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"version": "1", "data": [ROW]}, r"one JSON object with the keys 'version', 'data'; .*`jq \.data "),
        (
            {"info": {"list": [1]}, "annotations": [ROW], "more": []},
            r"'info', 'annotations', 'more'; .*`jq \.annotations ",
        ),
        ({"0001": ROW, "0002": ROW}, r"the keys '0001', '0002'; .*`jq '\[\.\[\]\]' "),
        (ROW, "JSON objects span many lines each; write one per line: `jq -c "),
    ],
)
def test_a_json_object_is_told_what_to_do(tmp_path, value, says):
    (tmp_path / "a.json").write_text(json.dumps(value, indent=1))
    for given in (None, "llava-json"):
        with pytest.raises(DataError, match=says):
            open_source(DataSpec("s", f"{tmp_path}/a.json", format=given))


@pytest.mark.parametrize(
    ("text", "given", "says"),
    [
        (json.dumps({"data": [ROW]}), None, r"the keys 'data'; .*`jq \.data "),
        (json.dumps({"data": [ROW] * 2000}), None, r"the keys 'data'; .*`jq \.data "),
        (
            '{"text": "a", "tags": []}\n{"text": "b"}',
            None,
            "a JSON object per line, with the keys 'text', 'tags'; a row needs",
        ),
        (
            json.dumps(ROW) + "\n" + json.dumps(ROW),
            "llava-json",
            "one JSON object per line: give format messages-jsonl",
        ),
    ],
)
def test_a_json_object_on_one_line_is_told_too(tmp_path, text, given, says):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=says):
        open_source(DataSpec("s", f"{tmp_path}/a.json", format=given))


def test_a_given_format_is_taken_and_an_unknown_one_refused(tmp_path):
    touch(tmp_path, "a.json")
    assert open_source(DataSpec("s", f"{tmp_path}/a.json", format="llava-json")).scan(1) == []
    with pytest.raises(DataError, match=r"unknown format 'llava'; valid formats: .*llava-json"):
        open_source(DataSpec("s", f"{tmp_path}/a.json", format="llava"))


def test_a_negative_limit_is_refused(tmp_path):
    touch(tmp_path, "a.json")
    with pytest.raises(DataError, match="limit is -1"):
        open_source(DataSpec("s", f"{tmp_path}/a.json", limit=-1))


def test_an_unreadable_file_is_one_line(tmp_path):
    touch(tmp_path, "a.json")
    (tmp_path / "a.json").chmod(0)
    if os.access(tmp_path / "a.json", os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(DataError, match="cannot be opened"):
        open_source(DataSpec("s", f"{tmp_path}/a.json"))
