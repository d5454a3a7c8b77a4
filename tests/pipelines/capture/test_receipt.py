"""A finished capture run again: neither processor nor files are read, unless something differs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.capture import cache_teacher, receipt
from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from teacher_cache.sources import DataSpec


class LongWay(Exception):
    pass


@pytest.fixture(scope="module")
def request_in(
    make_request: Callable[..., CaptureRequest], tiny_teacher: Path, world: Any
) -> Callable[[Path], CaptureRequest]:
    """A capture of a teacher and a mixture that lie in this folder."""

    def make(folder: Path) -> CaptureRequest:
        teacher = shutil.copytree(tiny_teacher, folder / "teacher")
        data = shutil.copytree(Path(world.captions).parent, folder / "data")
        captions = str(data / Path(world.captions).name)
        parts = (
            DataSpec("caption", captions, image_root=str(data / "images"), template="plain"),
            DataSpec("sft", str(data / "train" / "*.parquet"), template="chat"),
        )
        return make_request(folder / "cache", teacher=teacher, fields=("response_topk",), data=parts)

    return make


@pytest.fixture
def request_for(
    request_in: Callable[[Path], CaptureRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> CaptureRequest:
    """Such a capture, with a memory of its own."""
    monkeypatch.setenv(receipt.FOLDER, str(tmp_path / "memory"))
    return request_in(tmp_path)


@pytest.fixture(scope="module")
def captured(
    request_in: Callable[[Path], CaptureRequest], tmp_path_factory: pytest.TempPathFactory
) -> tuple[CaptureRequest, Path, Path]:
    """(a finished capture, its folder, a copy of that folder)."""
    place = tmp_path_factory.mktemp("captured")
    request = request_in(place / "here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(receipt.FOLDER, str(place / "here" / "memory"))
        capture(request)
    return request, place / "here", Path(shutil.copytree(place / "here", place / "kept"))


@pytest.fixture
def finished(
    captured: tuple[CaptureRequest, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[CaptureRequest, Path]:
    """(a finished capture, its folder), with the bytes and times that it had when it ended."""
    request, here, kept = captured
    monkeypatch.setenv(receipt.FOLDER, str(here / "memory"))
    shutil.rmtree(here)
    shutil.copytree(kept, here)
    return request, here


def takes_the_long_way(asked: CaptureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    def refuse(*_: Any) -> Any:
        raise LongWay

    with monkeypatch.context() as patch:
        patch.setattr(cache_teacher, "load_processor", refuse)
        try:
            capture(asked)
        except LongWay:
            return True
    return False


def touched(path: Path) -> None:
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))


def test_a_finished_capture_reads_nothing_again(request_for: CaptureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert takes_the_long_way(request_for, monkeypatch)
    first = capture(request_for)
    assert not takes_the_long_way(request_for, monkeypatch)
    assert capture(request_for) == first
    more_hands = replace(request_for, settings=replace(request_for.settings, workers=2))
    assert not takes_the_long_way(more_hands, monkeypatch), "who makes it decides nothing"


def test_words_of_a_run_that_was_killed_behind_its_last_commit_go(request_for: CaptureRequest, tmp_path: Path) -> None:
    first = capture(request_for)
    word = tmp_path / "cache" / "progress" / "run-0.json"
    word.parent.mkdir()
    word.write_text("{}")
    assert capture(request_for) == first and not word.exists()


def test_a_mixture_that_changes_while_it_is_captured_is_not_remembered(
    request_for: CaptureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(request_for, lambda event, *_: touched(Path(request_for.data[0].path)) if event == "end" else None)
    assert not (tmp_path / "memory").exists()
    assert takes_the_long_way(request_for, monkeypatch)


CHANGES: dict[str, Callable[[CaptureRequest, Path], CaptureRequest]] = {
    "another seed": lambda asked, at: replace(asked, settings=replace(asked.settings, seed=3)),
    "another dtype": lambda asked, at: replace(asked, teacher=replace(asked.teacher, dtype="bfloat16")),
    "another folder": lambda asked, at: replace(asked, out=str(at / "elsewhere")),
    "a parameter": lambda asked, at: replace(asked, field_params={"response_topk": {"k": 3}}),
    "the mixture": lambda asked, at: touched(Path(asked.data[0].path)) or asked,
    "the teacher": lambda asked, at: touched(next((at / "teacher").glob("*.safetensors"))) or asked,
    "a file of the teacher more": lambda asked, at: (at / "teacher" / "new.json").write_text("{}") and asked,
    "a file of the mixture more": lambda asked, at: (
        shutil.copy(next((at / "data" / "train").iterdir()), at / "data" / "train" / "x.parquet") and asked
    ),
    "a lost commit": lambda asked, at: next((at / "cache" / "samples" / "commits").iterdir()).unlink() or asked,
    "another description": lambda asked, at: (
        [one.write_text(" " + one.read_text()) for one in (at / "cache" / "fields").glob("response_topk/field.json")]
        and asked
    ),
    "a broken memory": lambda asked, at: [one.write_text("[") for one in (at / "memory").iterdir()] and asked,
    "no memory": lambda asked, at: shutil.rmtree(at / "memory") or asked,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_differs_is_looked_at(
    finished: tuple[CaptureRequest, Path], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    request, here = finished
    assert not takes_the_long_way(request, monkeypatch)
    assert takes_the_long_way(CHANGES[change](request, here), monkeypatch)


def test_a_part_of_the_shards_is_no_finished_capture(
    request_for: CaptureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(replace(request_for, part_of_shards=(0, 2)))
    assert not (tmp_path / "memory").exists()
    assert takes_the_long_way(request_for, monkeypatch)


def test_a_memory_beside_other_files_removes_none_of_them(
    request_for: CaptureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receipt, "MOST", 1)
    memory = tmp_path / "memory"
    memory.mkdir()
    for name in ("notes.json", "package.json", f"{'a' * 64}.json"):
        (memory / name).write_text("{}")
        os.utime(memory / name, (1, 1))
    capture(request_for)
    assert {"notes.json", "package.json"} <= {one.name for one in memory.iterdir()} and len(list(memory.iterdir())) == 3
