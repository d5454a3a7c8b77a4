"""Every file of a cache, one at a time: lost, empty, cut, flipped, or a pipe, a folder, a device or a link in its place.

Whatever reads the cache then says one line or reads what was written: no traceback, no waiting, and no "every checksum holds".
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli import main
from pipelines.capture.cache_teacher import capture
from pipelines.inspect.cache import survey
from student_train.needs import Served
from student_train.teacher_view import TeacherHeads
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.shards.sealed import seal, unseal

FIELDS = ("response_topk", "vision_hidden")
Damage = Callable[[Path], Any]


def change(edit: Callable[[bytes], bytes]) -> Damage:
    """Exchanged, not written to: files of the copy are hard links."""

    def damage(file: Path) -> None:
        whole = file.read_bytes()
        file.unlink()
        file.write_bytes(edit(whole))

    return damage


def instead(make: Callable[[Path], Any]) -> Damage:
    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


def linked_pipe(file: Path) -> None:
    os.mkfifo(pipe := file.parent / "pipe")
    file.symlink_to(pipe)


DAMAGES: dict[str, Damage] = {
    "lost": Path.unlink,
    "empty": change(lambda whole: b""),
    "cut in half": change(lambda whole: whole[: len(whole) // 2]),
    "a bit flipped": change(lambda whole: bytes([whole[0] ^ 4]) + whole[1:]),
    "grown": change(lambda whole: whole + b"\0" * 512),
    "30 GB of nothing": instead(lambda file: (file.touch(), os.truncate(file, 30 << 30))),
    "a pipe": instead(os.mkfifo),
    "a folder": instead(Path.mkdir),
    "a link to a device without end": instead(lambda file: file.symlink_to("/dev/zero")),
    "a link to a pipe": instead(linked_pipe),
    "a link to itself": instead(lambda file: file.symlink_to(file.name)),
    "a link to nothing": instead(lambda file: file.symlink_to("nothing")),
    "a link out of the cache": instead(lambda file: file.symlink_to("/etc/passwd")),
}


ON_EVERY_FILE = ("lost", "a bit flipped", "a pipe")
"""Of each of the other kinds a third of the files has its turn, the next third of the next kind: there is one reader of files."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """What waits for ever fails."""

    def late(*_: Any) -> None:
        raise AssertionError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def again(make_request, mixture) -> Callable[[Path], Any]:
    """The capture of ``whole``."""
    data = [replace(part, limit=3) for part in mixture]
    return lambda out: make_request(out, data=data, shards=2, fields=FIELDS)


@pytest.fixture(scope="module")
def again_standard(make_request, mixture) -> Callable[[Path], Any]:
    data = [replace(part, limit=8) for part in mixture]
    return lambda out: make_request(out, data=data, shards=2, store="standard", fields=())


def captured(request: Any) -> Path:
    capture(request)
    shutil.rmtree(Path(request.out) / ".staging", ignore_errors=True)
    return Path(request.out)


@pytest.fixture(scope="module")
def whole(again, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, one of each part, and a whole head."""
    return captured(again(tmp_path_factory.mktemp("caches") / "whole"))


@pytest.fixture(scope="module")
def standard(again_standard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrations and low-rank heads in place of the head."""
    return captured(again_standard(tmp_path_factory.mktemp("caches") / "standard"))


def each_kind(files: set[str]) -> set[str]:
    """One shard, and of the processor what is read: every other file has a twin among these. Where there are low-rank heads the caches
    differ by their calibrations."""
    if any("-low_rank_head-" in one for one in files):
        files = {one for one in files if "/calibration/" in one}
    return {one for one in files if "/000001" not in one and ("/processor/" not in one or "tokenizer.json" in one)}


def damaged_copies(
    folder: Path, target: Path, kind: str, skip: str = "", every: bool = True
) -> Iterator[tuple[str, Path]]:
    """(file, copy of the cache in which it is damaged), one after the other.

    Args:
        skip: what is in the names of files that are left out. every: of a kind ``ON_EVERY_FILE``; without, a third of them as well.
    """
    files = [one for one in sorted(each_kind(files_of(folder))) if not (skip and skip in one)]
    turn = slice(None) if every and kind in ON_EVERY_FILE else slice(list(DAMAGES).index(kind) % 3, None, 3)
    for file in files[turn]:
        shutil.copytree(folder, target, copy_function=os.link)
        DAMAGES[kind](target / file)
        yield file, target
        shutil.rmtree(target)


def files_of(folder: Path) -> set[str]:
    return {str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file()}


def read_all(folder: Path) -> list[str]:
    """What training reads: every row, and the heads."""
    cache = TeacherCache(str(folder))
    names = tuple(sorted(cache.fields))
    rows = CachedSamples(cache, cache.parts(), names)
    TeacherHeads.open(cache, Served({"all": names}, ()), __import__("torch").device("cpu"))
    read = [rows.read(p, r) for p, count in enumerate(rows.counts) for r in range(count)]
    return [f"{row.key} {row.sample} {row.fields}" for row in read]


def one_line(*words: str) -> Result:
    """A command that may refuse, in one line."""
    result = CliRunner().invoke(main, list(words))
    assert isinstance(result.exception, SystemExit | None), (words, result.exception)
    assert result.exit_code in (0, 1), (words, result.output)
    return result


CASES = [*(("whole", kind) for kind in DAMAGES), *(("standard", kind) for kind in ("lost", "cut in half", "a pipe"))]


@pytest.mark.parametrize(("which", "kind"), CASES)
def test_whatever_stands_in_a_file_s_place(
    request: pytest.FixtureRequest, which: str, tmp_path: Path, kind: str
) -> None:
    folder: Path = request.getfixturevalue(which)
    good = read_all(folder)
    for file, copy in damaged_copies(folder, tmp_path / "cache", kind):
        with within(20):
            try:
                assert read_all(copy) == good, f"{file}: other rows"
            except KdcliError as error:
                assert str(copy) in str(error) or file in str(error), f"{file}: {error}"
            try:
                said = "\n".join(map(str, survey(str(copy))[1]))
            except KdcliError as error:
                said = str(error)
            assert said, f"verify finds nothing: {file}"
            one_line("cache", "status", str(copy))
            one_line("cache", "gc", str(copy), "--yes")
        gone = files_of(folder) - files_of(copy) - {file}
        if "/commits/" in file and kind == "lost":  # as after a kill before the commit: nothing names these
            gone = {one for one in gone if not one.startswith(file.partition("commits/")[0])}
        assert not gone, f"gc took more than {file}"


def captured_again(copies: Iterator[tuple[str, Path]], make: Callable[[Path], Any]) -> None:
    """The same capture again makes whole what was damaged, or says which file is gone; it never says done of less."""
    for file, copy in copies:
        with within(60):
            try:
                capture(make(copy))
            except KdcliError as error:
                assert Path(file).name in str(error), f"{file}: {error}"
            else:
                assert survey(str(copy))[1] == [], f"done without {file}"


@pytest.mark.parametrize("kind", ["lost", "cut in half", "a pipe"])
def test_a_capture_again_looks_at_every_file(whole: Path, again, tmp_path: Path, kind: str) -> None:
    """Bits are for ``verify``: nothing is hashed, so a tokenizer that is cut passes."""
    skip = "/processor/" if kind == "cut in half" else ""
    captured_again(damaged_copies(whole, tmp_path / "cache", kind, skip, every=kind == "lost"), again)


def test_a_capture_again_looks_at_calibrations(standard: Path, again_standard, tmp_path: Path) -> None:
    captured_again(damaged_copies(standard, tmp_path / "cache", "lost"), again_standard)


def test_what_is_gone_comes_back(whole: Path, again, tmp_path: Path) -> None:
    """The bytes that the commit names, though nothing was asked for but the same capture; and it says so."""
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    gone = [next((folder / name).glob("000000*")) for name in ("samples/data", "fields/response_topk/index")]
    gone += [next(folder.glob("teacher/*/head.safetensors")), next(folder.glob("teacher/*/processor/tokenizer.json"))]
    before = [one.read_bytes() for one in gone]
    for one in gone:
        one.unlink()
    summary = capture(again(folder))
    assert summary["notes"] == ["1 committed shard had lost files and was made again"]
    assert [one.read_bytes() for one in gone] == before and survey(str(folder))[1] == []


def test_other_bytes_than_those_that_are_gone_are_refused(whole: Path, again, tmp_path: Path) -> None:
    """A machine of another kind makes others: nothing is replaced, and the fix is named."""
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    tar = next((folder / "fields" / "vision_hidden" / "data").glob("000000*"))
    commit = folder / "fields" / "vision_hidden" / "commits" / "000000.json"
    other = {**unseal(commit.read_bytes(), ""), "tar": "000000-ffffffff.tar", "tar_sha256": "f" * 64}
    tar.unlink()
    commit.write_bytes(seal(other))
    with pytest.raises(
        CacheError, match=r"data/000000-ffffffff.tar is missing; capturing it again here .* repair --replace"
    ):
        capture(again(folder))
    assert unseal(commit.read_bytes(), "") == unseal(seal(other), "")


@pytest.mark.parametrize(
    "folder", ["fields", "fields/vision_hidden", "samples/commits", "fields/vision_hidden/commits"]
)
@pytest.mark.parametrize("gone", ["a link to nothing", "a link to itself", "a file"])
def test_a_folder_that_is_elsewhere_is_not_gone(whole: Path, tmp_path: Path, folder: str, gone: str) -> None:
    """A link to a disk that is not mounted: nothing that belongs to it is garbage, and no cache is whole without it."""
    shutil.copytree(whole, copy := tmp_path / "cache")
    (copy / folder).rename(tmp_path / "disk")
    if gone == "a file":
        (copy / folder).write_bytes(b"")
    else:
        (copy / folder).symlink_to("nothing" if gone == "a link to nothing" else (copy / folder).name)
    before = files_of(copy)
    for words in (("cache", "verify"), ("cache", "gc", "--yes"), ("cache", "repair", "--dry-run")):
        run = one_line(*words[:2], str(copy), *words[2:])
        assert str(copy / folder) in run.output and (run.exit_code or "--dry-run" in words), (words, run.output)
    assert files_of(copy) == before
