"""What removes or replaces files of a cache does so alone: beside a capture it refuses, and a capture beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli import main
from pipelines.capture import heartbeat, presence
from pipelines.capture.cache_teacher import capture
from pipelines.capture.heartbeat import FOLDER, Word, forget, new_run, this_machine, words
from pipelines.capture.presence import GONE_AFTER, at_work
from pipelines.edit.derive import subset
from pipelines.edit.fields import drop_field
from pipelines.edit.repair import RepairRequest, repair
from pipelines.inspect.cache import collect_garbage
from teacher_cache.errors import CacheError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.storage import Storage

DRAFT = f".staging/{'0f' * 16}-manifest.json"


@pytest.fixture
def cache(tiny_cache: Path, copy_of) -> Path:
    """With one draft of a killed capture."""
    folder: Path = copy_of(tiny_cache)
    (folder / DRAFT).parent.mkdir(exist_ok=True)
    (folder / DRAFT).write_bytes(b"half")
    return folder


def kdcli(*words: str) -> Result:
    return CliRunner().invoke(main, [*words])


def say(cache: Path, doing: str = "cache-teacher", said_ago: float = 0.0, **values: Any) -> Path:
    """The word of somebody else: of another machine, unless ``values`` say otherwise."""
    now = time.time()
    word = Word(f"{new_run()}-000000", "node7:31", now, now, machine="another boot pid:[1]", doing=doing)
    word = replace(word, **values)
    path = cache / FOLDER / f"{word.worker}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(word)))
    os.utime(path, (now - said_ago, now - said_ago))
    return path


def edits(cache: Path) -> dict[str, Callable[[], Any]]:
    return {
        "cache gc": lambda: collect_garbage(TeacherCache(str(cache)), remove=True),
        "cache drop-field": lambda: drop_field(str(cache), "relation", remove=True),
        "cache repair": lambda: repair(RepairRequest(str(cache), None, (), None, {})),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("edit", ["cache gc", "cache drop-field", "cache repair"])
def test_an_edit_refuses_while_anybody_is_at_work(cache: Path, edit: str) -> None:
    before = sorted(one for one in cache.rglob("*") if FOLDER not in one.parts)
    with at_work(Storage(cache), "cache-teacher"), pytest.raises(CacheError, match="`kdcli cache-teacher` is at work"):
        edits(cache)[edit]()
    with (
        at_work(Storage(cache), "cache gc", alone=True),
        pytest.raises(CacheError, match="`kdcli cache gc` is at work"),
    ):
        edits(cache)[edit]()
    say(cache, doing="", shard=3)  # a worker whose parent died
    with pytest.raises(CacheError, match="a capture's worker is at work"):
        edits(cache)[edit]()
    forget(Storage(cache))
    assert sorted(one for one in cache.rglob("*") if FOLDER not in one.parts) == before
    assert not (cache / FOLDER).exists()
    edits(cache)[edit]()
    assert not (cache / FOLDER).exists()


def test_the_other_order(cache: Path, make_request, tmp_path: Path) -> None:
    """Captures beside one another, and nothing that writes beside what must be alone."""
    (cache / "fields" / "relation" / "commits" / "000000.json").unlink()
    with at_work(Storage(cache), "cache gc", alone=True):
        with pytest.raises(CacheError, match="`kdcli cache gc` is at work here"):
            capture(make_request(cache))
        with pytest.raises(CacheError, match="`kdcli cache gc` is at work here"):
            subset(str(cache), str(cache), fields=())
    with at_work(Storage(cache), "cache-teacher"):
        capture(make_request(cache))
    assert not (cache / FOLDER).exists()


def test_a_capture_says_so_from_its_first_write_on(make_request, tmp_path: Path) -> None:
    """Before any worker does: while calibrations are fitted and fields described; and `gc` sees it from anywhere."""
    out, said = tmp_path / "cache", []

    def progress(event: str, *_: int) -> None:
        said.append((event, kdcli("cache", "gc", str(out), "--yes").output, words(Storage(out))))

    capture(make_request(out, fields=("response_topk",)), progress)
    events, outputs, workers = zip(*said)
    assert events[0] == "start" and not workers[0] and any(workers)
    assert all("`kdcli cache-teacher` is at work here" in one and one.count("\n") == 1 for one in outputs), outputs
    assert not (out / FOLDER).exists()


def test_without_yes_everybody_may_look(cache: Path) -> None:
    say(cache)
    assert DRAFT in kdcli("cache", "gc", str(cache)).output
    assert kdcli("cache", "drop-field", str(cache), "relation").exit_code == 0
    assert kdcli("cache", "repair", str(cache), "--dry-run").exit_code == 0


def test_a_killed_capture_of_this_machine_is_no_obstacle(cache: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    path = say(cache, host=f"here:{child.pid}", machine=this_machine(), updated=time.time() + 60)
    with pytest.raises(CacheError, match=r"wait for its end, or end it$"):
        collect_garbage(TeacherCache(str(cache)), remove=True)
    child.kill()
    child.wait()
    assert str(path.relative_to(cache)) in collect_garbage(TeacherCache(str(cache)), remove=True)
    assert not path.exists() and not (cache / DRAFT).exists()


def test_a_number_that_another_process_has_by_now(cache: Path) -> None:
    """This process is younger than the word that names its number."""
    say(cache, host=f"here:{os.getpid()}", machine=this_machine(), updated=time.time() - 86_400)
    collect_garbage(TeacherCache(str(cache)), remove=True)


@pytest.mark.parametrize("clock", [-7200.0, 0.0, 7200.0])
def test_the_word_of_another_machine_ages_by_the_storage_s_clock(cache: Path, clock: float) -> None:
    """Whatever the other machine's clock says."""
    path = say(cache, said_ago=100, updated=time.time() + clock)
    result = kdcli("cache", "gc", str(cache), "--yes")
    assert result.exit_code == 1 and (cache / DRAFT).exists()
    assert "on node7:31, last word 100 s ago" in result.output and f"is {GONE_AFTER:.0f} s old" in result.output
    os.utime(path, (time.time() - GONE_AFTER - 1,) * 2)
    assert kdcli("cache", "gc", str(cache), "--yes").exit_code == 0 and not (cache / DRAFT).exists()


def test_a_worker_that_failed_is_not_at_work(cache: Path) -> None:
    say(cache, doing="", error="no memory left")
    collect_garbage(TeacherCache(str(cache)), remove=True)


def test_two_that_begin_together_never_both_go_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The word is there before one looks: whatever begins between the two is seen."""
    looked: list[str] = []
    real = presence.refuse_others

    def late(storage: Storage, own: str, alone: bool) -> None:
        if not looked:
            looked.append(own)
            with pytest.raises(CacheError, match="`kdcli cache gc` is at work"), at_work(storage, "cache-teacher"):
                raise AssertionError("both are at work")
        real(storage, own, alone)

    monkeypatch.setattr(presence, "refuse_others", late)
    collect_garbage(TeacherCache(str(cache)), remove=True)
    assert looked and not (cache / DRAFT).exists()


def test_a_full_disk_does_not_keep_garbage(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be said on it; so no capture can begin, and what runs is seen."""

    def full(storage: Storage, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(storage))

    monkeypatch.setattr(Storage, "put_bytes", full)
    with pytest.raises(OSError, match="No space"), at_work(Storage(cache), "cache-teacher"):
        pass
    path = say(cache)
    with pytest.raises(CacheError, match="is at work"):
        collect_garbage(TeacherCache(str(cache)), remove=True)
    path.unlink()
    assert DRAFT in collect_garbage(TeacherCache(str(cache)), remove=True)


def test_commands_stay_said_when_workers_are_forgotten(cache: Path) -> None:
    """A capture that ends removes what its workers said, and not that another one is at work."""
    storage = Storage(cache)
    with at_work(storage, "cache-teacher"):
        say(cache, doing="", shard=1)
        forget(storage)
        (word,) = heartbeat.all_words(storage).values()
        assert word.doing == "cache-teacher" and not words(storage)
    assert not (cache / FOLDER).exists()


@pytest.mark.usefixtures("healthy")
def test_in_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ages by the times that the store gives."""
    storage = Storage("s3://bucket/presence")
    with at_work(storage, "cache-teacher"):
        with at_work(Storage("s3://bucket/presence"), "cache add-field"):
            pass
        with (
            pytest.raises(CacheError, match="`kdcli cache-teacher` is at work"),
            at_work(storage, "cache gc", alone=True),
        ):
            pass
    monkeypatch.setattr(presence, "is_here", lambda word: False)
    said = json.dumps(asdict(Word("w", "node7:31", 0.0, 0.0, machine="another", doing="cache-teacher"))).encode()
    path = f"{FOLDER}/{new_run()}-000000.json"
    storage.put_bytes(said, path)
    with pytest.raises(CacheError, match="on node7:31"), at_work(storage, "cache gc", alone=True):
        pass
    monkeypatch.setattr(presence, "GONE_AFTER", -10.0)
    with at_work(storage, "cache gc", alone=True):
        assert presence.dead_words(storage)
    storage.remove(path)
    assert storage.names(FOLDER) == []


@pytest.mark.usefixtures("healthy")
def test_what_a_store_holds_is_read_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage("s3://bucket/limits")
    for name, data in {"a.json": b"", "b.json": b"12345", "c.json": b"x" * 70_000}.items():
        storage.put_bytes(data, f"{FOLDER}/{name}")
    assert storage.sizes(FOLDER) == {"a.json": 0, "b.json": 5, "c.json": 70_000}
    assert list(storage.read_each([f"{FOLDER}/{name}" for name in ("a.json", "b.json")])) == [b"", b"12345"]
    with pytest.raises(CacheError, match=r"c\.json: more than 65,536 bytes"):
        storage.read(f"{FOLDER}/c.json")
    with pytest.raises(FileNotFoundError):
        storage.read(f"{FOLDER}/d.json")
    assert storage.head(f"{FOLDER}/c.json", 3) == b"xxx" and storage.modified(f"{FOLDER}/d.json") is None
    assert abs((storage.modified(f"{FOLDER}/b.json") or 0.0) - time.time()) < 60


def test_a_cache_that_is_not_ours_to_write_to_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the name of a draft: and reading goes on."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", f"{cache}/.staging/1234-word.json")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    run = kdcli("cache", "gc", str(cache), "--yes")
    assert run.exit_code == 1 and run.output.startswith(f"Error: {cache}: cannot be written to (Permission denied")
    assert kdcli("cache", "verify", str(cache)).exit_code == 0


def test_of_a_command_and_its_workers_the_command_is_named(cache: Path) -> None:
    """Whichever of their words, said in one second, stands first."""
    say(cache, doing="", worker="20260101-000000-000000-000000")
    say(cache, worker="20260101-000000-ffffff-000000")
    assert "`kdcli cache-teacher` is at work here" in kdcli("cache", "gc", str(cache), "--yes").output
