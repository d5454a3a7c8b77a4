"""A name that a user gave is the place of that name, or is refused in one line; never another place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.errors import DataError, KdcliError, SkipSample
from teacher_cache.records import Sample
from teacher_cache.shards.places import is_remote, local_path, place_of
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec, open_source
from teacher_cache.sources.files import expand_paths, open_binary
from teacher_cache.sources.image_folder import ImageFolder

ODD = [
    "c::v2",
    "run::2024/cache",
    "memory::x",
    "zip::a.zip",
    "file::x",
    "file:x",
    "local:x",
    "memory:x",
    "data:x",
    "s3:",
    "http:",
    "C:/x",
    "C:\\x",
    "a*b?[c]",
    "{a,b}",
    "a%20b",
    "a b",
    " a",
    "a#b",
    "a?b",
    "-x",
    "--yes",
    "a\nb",
    "~x",
    "~root",
    "./~",
    "./~/x",
    "./s3:/x",
    "./a://b",
    "./simplecache::s3://bucket/x",
    "x/s3://bucket/y",
    "x/../y",
    "ä",
    "'\"$x`",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a home beside it."""
    (tmp_path / "work" / "x").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(
    "say", [str, lambda name: f"{name}/", lambda name: f"file://{name}", lambda name: f"{os.getcwd()}/{name}"]
)
def test_a_path_is_the_folder_of_that_name(here: Path, name: str, say: Callable[[str], str]) -> None:
    (here / name).mkdir(parents=True, exist_ok=True)
    storage = Storage(say(name))
    assert storage.put_new("mine", b"1") and storage.names("") == ["mine"] and storage.files("") == ["mine"]
    assert (here / name / "mine").read_bytes() == b"1"
    assert local_path(say(name)).samefile(here / name)
    assert Storage(storage.url).root == storage.root == Storage(local_path(say(name))).root
    assert Storage(str(local_path(say(name)))).root == storage.root


@pytest.mark.parametrize("name", [name for name in ODD if not name.startswith("./")])
def test_data_is_the_file_of_that_name(here: Path, name: str) -> None:
    folder = here / "data" / name
    folder.mkdir(parents=True)
    (folder / name.replace("/", "_")).write_bytes(b"mine")
    given = f"data/{name}/{name.replace('/', '_')}"
    (found,) = expand_paths(given)
    with open_binary(found) as opened:
        assert opened.read() == b"mine"
    (folder / "picture.png").write_bytes(b"pixels")
    assert ImageFolder(f"data/{name}").read("picture.png") == b"pixels"


def test_a_glob_finds_odd_names_and_opens_those(here: Path) -> None:
    for folder in ("~", "s3:", "a::b", "file:"):
        (here / folder).mkdir()
        (here / folder / "rows.json").write_text(folder)
    found = expand_paths("*/rows.json")
    assert len(found) == 4
    assert {open_binary(path).read().decode() for path in found} == {"~", "s3:", "a::b", "file:"}


@pytest.mark.parametrize("name", ["run[1]", "run*", "set{a,b}", "half{", "a?"])
def test_a_pattern_in_a_folder_that_looks_like_one(here: Path, name: str) -> None:
    for folder in (name, "run1", "run2", "seta", "setb", "ab"):
        (here / folder / "in").mkdir(parents=True)
        for number in range(2):
            (here / folder / "in" / f"{number}.json").write_text(folder)
    wanted = [f"{name}/in/0.json", f"{name}/in/1.json"]
    for pattern in (f"{name}/in/*.json", f"{name}/in/{{0,1}}.json", f"{name}/*/*.json", f"{name}/**/[01].json"):
        assert expand_paths(pattern) == wanted
        assert expand_paths(str(here / pattern)) == [str(here / one) for one in wanted]
    (here / "runa").write_text("x")
    for pattern in (name, f"{name}/in"):
        with pytest.raises(DataError, match="is a folder"):
            expand_paths(pattern)


def test_home_is_home_everywhere(here: Path) -> None:
    home = here.parent / "home"
    (home / "rows.json").write_text("[]")
    assert local_path("~") == home and local_path("~/x") == home / "x"
    assert Storage("~/x").root == str(home / "x")
    assert expand_paths("~/rows.json") == [str(home / "rows.json")]
    assert local_path(Path("~/x")) == here / "~/x"


REFUSED = {
    "": "empty",
    "file://": "empty",
    "simplecache::s3://bucket/x": "not chained",
    "filecache::http://host/x": "not chained",
    "zip://a.json::s3://bucket/x.zip": "not chained",
    "zip://a.json::x.zip": "zip:// is read through",
    "zip::file://x.zip": "not chained",
    "simplecache://x": "read through",
    "tar://x": "read through",
    "reference://x": "read through",
    "dir://x": "read through",
    "data://x": "read through",
    "s3://bucket/a::s3://bucket/b": "not chained",
    "s3:/bucket/x": r"two slashes .*\./s3:/bucket/x",
    "http:/host/x": "two slashes",
    "file:/x": "two slashes",
    "s3://": "no bucket",
    "s3:///x": "no bucket",
    "http://": "no host",
    "memory://": "no bucket",
    "memory:///": "no bucket",
    "s3://bucket/a/../b": r"\.\. mean",
    "http://host/./x": r"\.\. mean",
    "http://host/a#b": "%23",
    "s3://bucket/x?versionId=1": "versions",
    "a://b": r"as a path it is \./a://b",
    "S3://bucket/x": "as a path",
    "a\0b": "null byte",
    "a\udcffb": "not UTF-8",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_place_is_refused_in_a_line(here: Path, name: str) -> None:
    with pytest.raises(KdcliError, match=REFUSED[name]):
        Storage(name)
    with pytest.raises(KdcliError):
        expand_paths(name)
    assert sorted(path.name for path in here.iterdir()) == ["x"]


def test_a_working_folder_that_is_gone(here: Path) -> None:
    here.joinpath("x").rmdir()
    here.rmdir()
    assert place_of("/tmp").path == "/tmp"
    with pytest.raises(KdcliError, match="c: the folder in which this was typed is gone"):
        Storage("c")


def test_a_url_is_no_local_path() -> None:
    with pytest.raises(KdcliError, match="--output-dir s3://bucket/run: must be on a disk"):
        local_path("s3://bucket/run", "--output-dir")


@pytest.mark.parametrize("name", ["a*b", "a[1]", "{a,b}", "a%20b", "a b", "a?b", "ä"])
def test_keys_of_a_store_mean_themselves(name: str) -> None:
    storage = Storage(f"memory://odd/{name}/")
    assert storage.put_new("commits/000000.json", b"1") and [storage.read("commits/000000.json")] == [b"1"]
    assert fsspec.filesystem("memory").cat_file(f"/odd/{name}/commits/000000.json") == b"1"
    assert storage.files("") == ["commits/000000.json"] and storage.names("commits") == ["000000.json"]


def test_an_image_name_stays_below_a_root_in_a_store() -> None:
    root = ImageFolder("memory://pictures/a[1]")
    fsspec.filesystem("memory").pipe("/pictures/a[1]/x/y.png", b"pixels")
    fsspec.filesystem("memory").pipe("/pictures/secret.png", b"secret")
    assert root.read("x/y.png") == root.read("x/../x//y.png") == b"pixels"
    for name in ("../secret.png", "/pictures/secret.png", "x/../../secret.png", ".", ""):
        with pytest.raises(SkipSample, match="image_path_unsafe"):
            root.read(name)


def test_rows_and_pictures_in_folders_with_colons(here: Path) -> None:
    (here / "rows::v2").mkdir()
    row = {
        "id": "1",
        "image": "1.png",
        "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "x"}],
    }
    (here / "rows::v2" / "train.json").write_text(json.dumps([row]))
    (here / "rows::v2" / "1.png").write_bytes(b"\x89PNG")
    source = open_source(DataSpec("sft", "rows::v2/train.json"))
    (group,) = source.scan(500)
    (sample,) = source.read(group)
    assert isinstance(sample, Sample) and sample.images


@given(st.text(min_size=1, max_size=30))
def test_any_text_is_one_place_or_a_refusal(text: str) -> None:
    """What ``text`` of a place is given again is the same place; a local one is the path that the kernel sees."""
    try:
        place = place_of(text)
    except KdcliError:
        return
    assert place_of(place.text).path == place.path
    assert place.local != is_remote(text)
    if place.local and not text.startswith(("~", "file://", "local://")):
        assert place.path == str(Path.cwd() / text)
