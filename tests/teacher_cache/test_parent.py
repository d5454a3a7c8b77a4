"""Children end with a parent that was killed: on every start method, beside later children, and where they do not listen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARENT = """
import multiprocessing, os, signal, sys, threading, time
from teacher_cache.parent import end_with_parent

def child(number, grace, watches):
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)
    if watches:
        end_with_parent(grace)
    open(f"{sys.argv[1]}/{number}", "w").write(str(os.getpid()))
    time.sleep(60)

def begin(number, watches=True):
    context = multiprocessing.get_context(sys.argv[2])
    one = context.Process(target=child, args=(number, float(sys.argv[3]), watches))
    one.start()

if __name__ == "__main__":
    thread = threading.Thread(target=begin, args=(0,))  # that ends: its children must not
    thread.start()
    thread.join()
    begin(1, watches=False)  # under fork it holds every pipe that its parent holds
    time.sleep(60)
"""


def ends(number: int, seconds: float) -> bool:
    """Whether this process ends in time, or is a zombie that nobody fetches."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def written(file: Path) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (file.is_file() and file.read_text()):
        time.sleep(0.02)
    return int(file.read_text())


@pytest.fixture
def family(tmp_path: Path) -> Callable[..., tuple[subprocess.Popen[bytes], int, int]]:
    """(parent, a child that watches it, a later one that does not)"""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)

    def start(method: str, grace: float) -> tuple[subprocess.Popen[bytes], int, int]:
        words = [sys.executable, str(script), str(tmp_path), method, str(grace)]
        process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
        return process, *(written(tmp_path / str(number)) for number in (0, 1))

    return start


@pytest.mark.parametrize(("method", "grace"), [("spawn", 0.0), ("fork", 0.0), ("forkserver", 0.0), ("fork", 0.3)])
def test_a_child_ends_with_its_killed_parent(
    method: str, grace: float, family: Callable[..., tuple[subprocess.Popen[bytes], int, int]]
) -> None:
    """It ignores SIGTERM; not earlier, though the thread that started it is over."""
    parent, child, deaf = family(method, grace)
    try:
        assert not ends(child, 0.7), "its parent lives"
        parent.kill()
        parent.wait()
        assert ends(child, 10) and not ends(deaf, 0.1)
    finally:
        for number in (child, deaf):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        parent.kill()
        parent.wait()
