"""One writer a folder: who holds it is told, who was killed holds it no more, and another machine's word is watched."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pipelines.settings import Settings
from pipelines.train import output_lock
from pipelines.train.output_lock import NAME, alone
from pipelines.train.train_student import train
from student_train.config import TrainSettings
from teacher_cache.errors import KdcliError

HOLD = """
import os, sys, time
from pathlib import Path
from pipelines.train.output_lock import alone
os.register_at_fork(after_in_child=lambda: time.sleep(0.5))  # a child that has not run yet when its parent dies
with alone(Path(sys.argv[1]), "kdcli train-student", "--output-dir"):
    child = os.fork() if sys.argv[2] == "fork" else 0
    if sys.argv[2] == "fork" and not child:
        time.sleep(60)
    print(child, flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path, how: str = "alone") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds a folder, and the number of its child."""
    line = [sys.executable, "-P", "-c", HOLD, str(folder), how]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            process.kill()
            if child:
                os.kill(child, signal.SIGKILL)


def hold(folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
    with alone(folder, "kdcli eval", "--out", say):
        pass


def refused(folder: Path, match: str) -> None:
    with pytest.raises(KdcliError, match=match) as caught:
        hold(folder)
    assert "\n" not in str(caught.value)


def test_the_second_says_who_holds_it_and_a_killed_one_frees_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with holder(folder, "fork") as (process, child):
        host = re.escape(os.uname().nodename)
        said = rf"{folder}: kdcli train-student \(host {host}, process {process.pid}, since 20..-.* UTC\) writes there: .* another --out"
        refused(folder, said)
        process.kill()
        process.wait()
        os.kill(child, 0)  # a loader process that lives on does not hold it, once it has run at all
        for _ in range(100):
            with suppress(KdcliError):
                hold(folder)
                break
            time.sleep(0.05)
        else:
            pytest.fail("the child holds the folder of its killed parent")
    hold(folder)


def test_within_one_process(tmp_path: Path) -> None:
    with alone(tmp_path, "kdcli demo", "--out"):
        refused(tmp_path, f"kdcli demo .*process {os.getpid()}")
    with pytest.raises(RuntimeError), alone(tmp_path, "kdcli demo", "--out"):
        raise RuntimeError
    hold(tmp_path)


@pytest.mark.parametrize("kind", ["a file", "a link to nothing", "a name too long", "no name"])
def test_a_folder_that_cannot_be_made_is_one_line(kind: str, tmp_path: Path) -> None:
    place = tmp_path / {"a name too long": "a" * 300, "no name": "a\0b"}.get(kind, "run")
    if kind == "a file":
        place.write_text("mine")
    if kind == "a link to nothing":
        place.symlink_to("nowhere")
    with (
        pytest.raises(KdcliError, match=r"choose another|name another place") as caught,
        alone(place, "train-student", "--output-dir"),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_an_odd_lock_file_is_one_line(tmp_path: Path) -> None:
    for text in ("", "no json", "[]", "\0" * 600, json.dumps({"what": "\x1b[31m" * 200})):
        (tmp_path / NAME).write_text(text)
        with (tmp_path / NAME).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            refused(tmp_path, "writes there")
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    refused(tmp_path, r"\.lock: Too many levels of symbolic links")
    assert not (tmp_path / "elsewhere").exists()


def of_another_machine(folder: Path, beat: int) -> None:
    word = {
        "what": "kdcli train-student",
        "host": "node7",
        "machine": "other",
        "process": 1,
        "since": "then",
        "beat": beat,
    }
    with open(folder / NAME, "r+b" if (folder / NAME).exists() else "x+b", buffering=0) as file:
        # In place, as a holder does: a file that is cut short for a moment would be one left in order.
        output_lock._write(file, word)


def test_another_machine_that_is_alive(tmp_path: Path) -> None:
    """Its lock does not reach here, its word does."""
    ended = threading.Event()

    def renew() -> None:
        beat = 0
        while not ended.wait(0.05):
            of_another_machine(tmp_path, beat := beat + 1)

    of_another_machine(tmp_path, 0)
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        refused(tmp_path, r"kdcli train-student \(host node7, process 1, since then\) writes there")
    finally:
        ended.set()
        thread.join()


def test_another_machine_that_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_lock, "SILENT_SECONDS", 0.6)
    of_another_machine(tmp_path, 3)
    said: list[str] = []
    hold(tmp_path, said.append)
    (note,) = said
    assert "left by kdcli train-student (host node7" in note and "watching" in note
    hold(tmp_path, said.append)
    assert len(said) == 1, "what ended in order is not watched"


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The word alone is left: one who renews it is found, one who does not is taken for dead."""

    def none(file: Any, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(output_lock, "BEAT_SECONDS", 0.1)
    with alone(tmp_path, "kdcli train-student", "--output-dir"):
        refused(tmp_path, f"process {os.getpid()}")
    hold(tmp_path)


# ---- the commands


def settings_for(student: Path, output: Path) -> Settings:
    own = {"per_device_train_batch_size": 1, "max_steps": 2, "report_to": "none"}
    return Settings(train=TrainSettings(student=str(student), output_dir=str(output), **own))


def test_two_trainings_in_one_folder(tiny_cache: Path, tiny_student: Path, tmp_path: Path) -> None:
    """The second is refused before it writes anything, also through a link to the folder; a third one follows the first."""
    run, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(run)
    settings = settings_for(tiny_student, run)
    with holder(run):
        for output in (run, link):
            with pytest.raises(KdcliError, match=r"kdcli train-student \(host .*\) writes there.*--output-dir"):
                train(str(tiny_cache), "sft", settings_for(tiny_student, output), "PT")
        assert [one.name for one in run.iterdir()] == [NAME]

    def second(stage: str, step: int, *_: Any) -> None:
        with pytest.raises(KdcliError, match=f"process {os.getpid()}.* writes there"):
            train(str(tiny_cache), "sft", settings, "PT")
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(str(tiny_cache), "sft", settings, "PT", on_step=second)
    train(str(tiny_cache), "sft", settings, "PT")
    assert train(str(tiny_cache), "sft", settings, "PT")["stages"][0]["steps"] == 2
