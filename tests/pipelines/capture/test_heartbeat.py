"""What workers say while they capture: read from anywhere, gone when the work is done, and never what decides."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import main
from pipelines.capture import heartbeat
from pipelines.capture.cache_teacher import capture
from pipelines.capture.heartbeat import LOST_AFTER, Heartbeat, Word, forget, summary, words
from pipelines.terminal.tables import work_lines
from teacher_cache.errors import KdcliError
from teacher_cache.shards.storage import Storage


def test_a_worker_says_what_it_does(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    beating = Heartbeat(storage, "run", interval=0.02)
    with beating.on(7):
        beating.advance(256)
        beating.advance(44)
        (first,) = words(storage)
        while not words(storage)[0].rows:  # said by the thread
            threading.Event().wait(0.01)
        (said,) = words(storage)
        assert (said.shard, said.shard_rows, said.rows, said.error) == (7, 300, 300, None)
        assert said.worker == first.worker and said.updated >= first.updated >= said.started
    (said,) = words(storage)
    assert (said.shard, said.shard_rows, said.rows) == (None, 0, 300)
    forget(storage, "another run")
    assert words(storage)
    forget(storage, "run")
    assert not words(storage) and not (tmp_path / heartbeat.FOLDER).exists()


def test_a_failure_stays_said(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with pytest.raises(KdcliError), Heartbeat(storage, "run").on(3):
        raise KdcliError("no memory\nleft")
    (said,) = words(storage)
    assert said.shard == 3 and said.error == "no memory left"
    assert summary([said], 10)["failed"][0]["shard"] == 3 and not summary([said], 10)["running"]


def test_nonsense_in_the_folder_is_nobody(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for name, data in {"a.json": b"{", "b.json": b"[1]", "c.json": b'{"worker": "x"}', "d.json": b"\xff"}.items():
        storage.put_bytes(data, f"{heartbeat.FOLDER}/{name}")
    assert words(storage) == []


def test_rate_time_left_and_who_is_lost() -> None:
    now = 10_000.0
    said = [
        Word("a", "one:1", started=now - 100, updated=now - 5, shard=4, shard_rows=50, rows=950, waited=19.0),
        Word("b", "two:2", started=now - 100, updated=now, shard=None, rows=1000),
        Word("c", "three:3", started=now - 900, updated=now - LOST_AFTER - 1, shard=6, shard_rows=9, rows=99),
    ]
    found = summary(said, rows_left=850, now=now)
    assert [len(found[name]) for name in ("running", "lost", "failed")] == [2, 1, 0]
    assert found["rows_per_second"] == 20.0 and found["seconds_left"] == 40
    text = work_lines(found)
    assert "2 workers running, 20.0 rows/s, 40 s left" in text
    assert "one:1: shard 000004, 50 rows of it; its teacher waited 20% of the time for encoding" in text
    assert "three:3, shard 000006" in text
    assert summary(said[2:], 850, now)["seconds_left"] is None


def test_a_worker_whose_process_is_gone_is_lost_at_once() -> None:
    """On its own machine; a number means nothing elsewhere, nor in another container. A killed one that nobody fetched is gone too."""
    now, ours = time.time(), heartbeat.this_machine()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    word = Word("w", f"here:{child.pid}", now, now, shard=3, machine=ours)
    assert ours and len(summary([word], 10)["running"]) == 1
    child.kill()
    while not heartbeat.is_gone(word):
        time.sleep(0.01)
    assert child.returncode is None, "a zombie: this process has not asked for it"
    assert summary([word], 10)["lost"] and "lost, its process gone" in work_lines(summary([word], 10))
    child.wait()
    assert heartbeat.is_gone(word)
    for machine in (None, "another boot pid:[1]"):
        assert summary([replace(word, machine=machine)], 10)["running"]


def test_a_number_that_another_user_s_process_has_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by signals it looks alive for ever; and clocks that are set do not make a process another one."""
    now, ours = time.time(), heartbeat.this_machine()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    begun = int(heartbeat._status(str(child.pid))[19])
    word = Word("w", f"here:{child.pid}", now - 9000, now - 9000, machine=ours, begun=begun)
    with monkeypatch.context() as patch:
        patch.setattr(heartbeat.os, "kill", _not_permitted)
        assert not heartbeat.is_gone(word), "the clock was set since"
        assert heartbeat.is_gone(replace(word, begun=begun - 1)) and heartbeat.is_gone(replace(word, begun=None))
    child.kill()
    child.wait()
    assert heartbeat.is_gone(word) and heartbeat.is_gone(replace(word, host=f"here:{1 << 80}"))
    monkeypatch.setattr(heartbeat.os, "kill", _not_permitted)  # it is there, and /proc keeps it to itself
    assert not heartbeat.is_here(word) and not heartbeat.is_gone(word)


def _not_permitted(*_: int) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_an_interrupted_worker_does_not_work(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with pytest.raises(KeyboardInterrupt), Heartbeat(storage, "run").on(3):
        raise KeyboardInterrupt
    found = summary(words(storage), 10)
    assert not found["running"] and found["failed"][0]["error"] == "KeyboardInterrupt"


def test_a_finished_capture_leaves_no_words(make_request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are there while shards are captured, those of killed runs too; the complete cache has none."""
    seen: list[str] = []
    out = tmp_path / "cache"
    Storage(out).put_bytes(json.dumps({"worker": "old"}).encode(), f"{heartbeat.FOLDER}/killed-1.json")

    def progress(event: str, done: int, total: int) -> None:
        if event == "rows":
            result = CliRunner().invoke(main, ["cache", "status", str(out)])
            assert result.exit_code == 0, result.output
            seen.append(result.output)

    capture(make_request(out), progress)
    assert seen and all("1 worker running" in text and "rows of it" in text for text in seen)
    assert not (out / heartbeat.FOLDER).exists()
    assert "running" not in CliRunner().invoke(main, ["cache", "status", str(out)]).output
