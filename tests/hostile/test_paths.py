"""No name in a document or a mixture leads out of the folder it belongs to, and no link makes ``kdcli`` remove what is not the cache's."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from benchmarks.fuzz_targets import Folder, joined, shard_of, small_cache
from pipelines.edit.derive import subset
from pipelines.edit.fields import drop_field
from pipelines.inspect.cache import check, collect_garbage
from teacher_cache.errors import CacheError, SkipSample
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.records import Sample, SkipRecord
from teacher_cache.shards.commit import parse_commit
from teacher_cache.shards.index import dump_index, parse_index
from teacher_cache.shards.sealed import seal, unseal
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec, open_source
from teacher_cache.sources.image_folder import ImageFolder

LEADING_OUT = [
    "../x.tar",
    "/etc/passwd",
    "a/b.tar",
    "..",
    ".",
    "",
    "a\\b.tar",
    "a\0.tar",
    ".hidden",
    "ä.tar",
    "x.tar\n",
]


@pytest.fixture
def folder() -> Folder:
    """A whole small cache, to change."""
    made = Folder()
    assert [problem for problem in check(TeacherCache(str(made.path))) if "processor.json" not in problem.what] == []
    return made


@pytest.mark.parametrize("name", LEADING_OUT)
@pytest.mark.parametrize("key", ["tar", "index"])
def test_a_commit_names_files_of_its_folder_only(key: str, name: str) -> None:
    data = small_cache()["samples/commits/000000.json"]
    with pytest.raises(CacheError, match=r"here: damaged commit .*not the name of a tar or index"):
        parse_commit(seal({**unseal(data, ""), key: name}), "here")


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "teacher/../../secret", "teacher\\..\\x", "teacher/\0"])
def test_a_field_is_read_with_files_of_the_cache_only(folder: Folder, path: str) -> None:
    """Even where the file is there, and has the checksum that the description names."""
    secret = folder.path.parent / "secret"
    secret.write_bytes(b"mine")
    name = "fields/vision_hidden/field.json"
    body = unseal(small_cache()[name], "")
    body["calibration"] = {"path": path, "sha256": hashlib.sha256(b"mine").hexdigest()}
    folder.write(name, seal(body))
    try:
        with pytest.raises(CacheError, match="is not a file of a cache"):
            TeacherCache(str(folder.path)).open_field("vision_hidden")
    finally:
        secret.unlink()


@pytest.mark.parametrize("path", ["..", "a/../b", "/a", "a\\b", "a\0b"])
def test_a_storage_reads_and_writes_below_its_root_only(tmp_path: Path, path: str) -> None:
    storage = Storage(tmp_path / "cache")
    for use in (storage.read, storage.size, storage.open, storage.names, storage.exists, storage.remove):
        with pytest.raises(CacheError, match="is not a file of a cache"):
            use(path)
    with pytest.raises(CacheError, match="is not a file of a cache"):
        storage.put_new(path, b"")


OTHER_ENTRIES: dict[str, Callable[[Any], Any]] = {
    "key with a path": lambda e: replace(e, key="../../x"),
    "key with a line break": lambda e: replace(e, key="a\nb"),
    "key with a dot, which ends a key in a tar": lambda e: replace(e, key="a.b"),
    "no key": lambda e: replace(e, key=""),
    "a long key": lambda e: replace(e, key="k" * 300),
    "extension with a path": lambda e: replace(e, members=(replace(e.members[0], ext="x/../../y"),)),
    "no extension": lambda e: replace(e, members=(replace(e.members[0], ext=""),)),
    "an extension twice": lambda e: replace(e, members=e.members[:1] * 2),
    "before the tar": lambda e: replace(e, members=(replace(e.members[0], offset=-512),)),
    "behind the tar": lambda e: replace(e, members=(replace(e.members[0], size=1 << 40),)),
    "a negative count": lambda e: replace(e, vision_rows=-1),
    "a missing count": lambda e: replace(e, text_tokens=None),
}


@pytest.mark.parametrize("kind", OTHER_ENTRIES)
def test_an_index_holds_plain_keys_inside_its_tar(kind: str) -> None:
    commit, _, index = shard_of("samples")
    entries = parse_index(index, "", commit.tar_bytes, commit.written)
    with pytest.raises(CacheError, match="here: damaged index"):
        parse_index(dump_index([OTHER_ENTRIES[kind](entries[0])]), "here", commit.tar_bytes, 1)
    with pytest.raises(CacheError, match="twice"):
        parse_index(dump_index([*entries, *entries]), "here", commit.tar_bytes, 2)


def other_member(info: tarfile.TarInfo, **values: Any) -> tarfile.TarInfo:
    for name, value in values.items():
        setattr(info, name, value)
    return info


OTHER_MEMBERS: dict[str, dict[str, Any]] = {
    "symbolic link": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
    "hard link": {"type": tarfile.LNKTYPE, "linkname": "000000000-00000000.json"},
    "device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
    "pipe": {"type": tarfile.FIFOTYPE},
    "folder": {"type": tarfile.DIRTYPE},
    "another name": {"name": "../../evil.json"},
    "an absolute name": {"name": "/tmp/evil.json"},
}


@pytest.mark.parametrize("kind", OTHER_MEMBERS)
def test_a_tar_of_anything_but_the_plain_files_of_its_index(folder: Folder, kind: str) -> None:
    """Nothing is unpacked by names or kinds that a tar gives; ``verify`` names what another tool might unpack."""
    _, tar, index = shard_of("samples")
    stream = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(tar)) as old,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as new,
    ):
        for number, info in enumerate(old):
            content = old.extractfile(info)
            new.addfile(other_member(info, **OTHER_MEMBERS[kind]) if number == 0 else info, content)
    folder.write_shard("samples", joined(stream.getvalue(), index))
    problems = "\n".join(map(str, check(TeacherCache(str(folder.path)))))
    assert "does not hold the members that its index lists" in problems


def test_a_tar_that_is_none_is_a_problem_and_no_crash(folder: Folder) -> None:
    _, tar, index = shard_of("samples")
    folder.write_shard("samples", joined(b"\xff" * len(tar), index))
    assert "samples shard 000000" in "\n".join(map(str, check(TeacherCache(str(folder.path)))))


def test_nothing_behind_a_link_is_removed(folder: Folder, tmp_path: Path) -> None:
    """A cache from elsewhere, whose data folder is a link to one's photographs."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for name in ("a.jpg", "000000-00000000.tar", "000000-00000000.parquet"):
        (photographs / name).write_bytes(b"dear to me")
    for name in ("vision_hidden/data", "vision_topk/index"):
        place = folder.path / "fields" / name
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
        place.symlink_to(photographs)
    with pytest.raises(CacheError, match="outside the cache, behind a link"):
        collect_garbage(TeacherCache(str(folder.path)), remove=True)
    drop_field(str(folder.path), "vision_hidden", remove=True)
    assert [one.read_bytes() for one in photographs.iterdir()] == [b"dear to me"] * 3
    assert not (folder.path / "fields" / "vision_hidden").exists()


# Images of a mixture


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image root that is a link itself, with links inside it, as they lie on clusters."""
    for place in ("disk/images/coco", "elsewhere/gqa"):
        (tmp_path / place).mkdir(parents=True)
        PIL.Image.new("RGB", (4, 4)).save(tmp_path / place / "a.png")
    (tmp_path / "secret.png").write_bytes(b"mine")
    images = tmp_path / "disk" / "images"
    (images / "same").symlink_to("coco")
    (images / "gqa").symlink_to(tmp_path / "elsewhere" / "gqa")
    (images / "one.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images").symlink_to(images)
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("name", "plain", "following"),
    [
        ("coco/a.png", "", ""),
        ("same/a.png", "", ""),
        ("coco/../same/a.png", "", ""),
        ("gqa/a.png", "image_path_unsafe", ""),
        ("one.png", "image_path_unsafe", ""),
        ("../secret.png", "image_path_unsafe", "image_path_unsafe"),
        ("../../secret.png", "image_path_unsafe", "image_path_unsafe"),
        ("gqa/../../../secret.png", "image_path_unsafe", "image_path_unsafe"),
        ("/etc/passwd", "image_path_unsafe", "image_path_unsafe"),
        ("coco\\a.png", "image_missing", "image_missing"),
        ("a\0b.png", "image_path_unsafe", "image_path_unsafe"),
        ("x" * 5000, "image_missing", "image_missing"),
    ],
)
def test_the_rule_of_image_paths(root: Path, name: str, plain: str, following: str) -> None:
    for follow, reason in ((False, plain), (True, following)):
        images = ImageFolder(str(root), follow)
        if not reason:
            assert images.read(name)
            continue
        with pytest.raises(SkipSample) as caught:
            images.read(name)
        assert caught.value.reason == reason
    assert ImageFolder(str(root)).read(str(root / "coco" / "a.png")), "an absolute path below the root"


def test_the_option_reaches_the_source_and_the_reason_names_it(root: Path, tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Black."}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": 1, "image": "gqa/a.png", "conversations": talk}]))

    def row(**given: Any) -> Sample | SkipRecord:
        source = open_source(DataSpec("sft", str(path), image_root=str(root), **given))
        (found,) = [row for group in source.scan(9) for row in source.read(group)]
        return found

    refused = row()
    assert isinstance(refused, SkipRecord) and "--follow-links" in refused.detail
    assert isinstance(row(follow_links=True), Sample)


def test_a_subset_copies_what_is_named_and_nothing_behind_a_link(tiny_cache: Path, copy_of, tmp_path: Path) -> None:
    """Whoever publishes a subset of a stranger's cache does not publish a file of their own with it."""
    (secret := tmp_path / "secret").write_bytes(b"mine")
    folder = copy_of(tiny_cache)
    (teacher,) = (folder / "teacher").iterdir()
    (teacher / "processor" / "notes.txt").symlink_to(secret)
    (teacher / "calibration").mkdir(exist_ok=True)
    (teacher / "calibration" / "x-calibration-0.safetensors").symlink_to(secret)
    subset(str(folder), str(tmp_path / "small"), parts=("caption",))
    assert check(TeacherCache(str(tmp_path / "small"))) == []
    assert not [one for one in (tmp_path / "small").rglob("*") if one.is_file() and one.read_bytes() == b"mine"]
    (teacher / "head.safetensors").unlink()
    (teacher / "head.safetensors").symlink_to(secret)
    with pytest.raises(CacheError, match=r"head\.safetensors does not have its checksum"):
        subset(str(folder), str(tmp_path / "other"), parts=("caption",))
