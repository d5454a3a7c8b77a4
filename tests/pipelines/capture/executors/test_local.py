"""Workers of this machine: whoever is killed, stopped or stuck, nothing waits for ever and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
COMMAND = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from pipelines.capture.executors import local
from teacher_cache import stopping
from teacher_cache.errors import KdcliError

local.GRACE = 1.0
SAID, KIND = Path(sys.argv[1]), sys.argv[2]

class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(one)

def make(worker):
    (SAID / f"worker-{worker}").write_text(str(os.getpid()))
    if KIND == "slow start":
        time.sleep(60)
    return task

def task(shard):
    (SAID / f"shard-{shard}").write_text(str(os.getpid()))
    if KIND == "long" and shard:
        for _ in range(6000):
            time.sleep(0.01)
            stopping.check()
    if KIND == "deaf" and shard:
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
    if KIND == "odd" and shard == 2:
        raise Odd(1, 2)
    if KIND == "wrong" and shard == 2:
        raise KdcliError("shard 2 cannot be made")
    return shard

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it, and so would we
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    multiprocessing.current_process()._config["semprefix"] = f"/of-{os.getpid()}"  # of the names of semaphores
    with stopping.listening():
        try:
            print(*sorted(local.run(make, range(5), 2)), flush=True)
        except (KdcliError, stopping.Stopped) as error:
            print(error, file=sys.stderr)
            sys.exit(getattr(error, "status", 1))
"""


class Run:
    """A command with two workers, in a session of its own."""

    def __init__(self, folder: Path, kind: str):
        self.folder = folder
        (folder / "command.py").write_text(COMMAND)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            words = [sys.executable, str(folder / "command.py"), str(folder), kind]
            self.process = subprocess.Popen(words, env=environment, stdout=out, stderr=err, start_new_session=True)

    def number(self, name: str) -> int:
        """The process that wrote this file, once it has."""
        file, deadline = self.folder / name, time.monotonic() + 60
        while not (file.is_file() and file.read_text()):
            assert time.monotonic() < deadline and self.process.poll() is None, self.said()
            time.sleep(0.01)
        return int(file.read_text())

    def said(self) -> str:
        return (self.folder / "err").read_text()

    def left(self, seconds: float = 10.0) -> list[str]:
        """What still runs of its session after so many seconds."""
        deadline = time.monotonic() + seconds
        while (found := self._running()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def _running(self) -> list[str]:
        told = subprocess.run(["ps", "-e", "-o", "sid=,stat=,args="], capture_output=True, text=True, check=True)
        lines = (line.split(None, 2) for line in told.stdout.splitlines())
        return [args for sid, state, args in lines if sid == str(self.process.pid) and state[0] != "Z"]

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[[str], Run]]:
    made: list[Run] = []

    def start(kind: str) -> Run:
        made.append(Run(tmp_path, kind))
        return made[-1]

    yield start
    for one in made:
        one.close()


def test_results_and_errors_come_back(run: Callable[[str], Run], tmp_path: Path) -> None:
    quick = run("quick")
    assert quick.process.wait(60) == 0 and (tmp_path / "out").read_text() == "0 1 2 3 4\n" and not quick.said()
    wrong = run("wrong")
    assert wrong.process.wait(60) == 1 and wrong.said() == "shard 2 cannot be made\n"
    odd = run("odd")  # an exception that does not travel
    assert odd.process.wait(60) == 1 and "Odd: 1" in odd.said() and "raise Odd(1, 2)" in odd.said()


@pytest.mark.parametrize(("kind", "where"), [("long", "shard-1"), ("slow start", "worker-1")])
def test_a_killed_worker_is_one_line(kind: str, where: str, run: Callable[[str], Run]) -> None:
    """It names the worker and what it was at; the others end, too."""
    job = run(kind)
    os.kill(job.number(where), signal.SIGKILL)
    assert job.process.wait(20) == 1
    (line,) = job.said().splitlines()
    place = "at shard 000001" if kind == "long" else "while it loaded its task"
    assert f" died {place} (killed by SIGKILL" in line and line.startswith("worker ")
    assert not job.left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command_alone_ends_long_shards(number: int, run: Callable[[str], Run]) -> None:
    job = run("long")
    job.number("shard-1")
    job.process.send_signal(number)
    assert job.process.wait(20) == (143 if number == signal.SIGTERM else -signal.SIGINT) and not job.left()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_workers_that_do_not_listen_end_too(number: int, run: Callable[[str], Run]) -> None:
    """The command is gone, or waits for them no longer than it says."""
    job = run("deaf")
    job.number("shard-1")
    job.process.send_signal(number)
    assert job.process.wait(20) == (143 if number == signal.SIGTERM else -number) and not job.left()


def test_workers_that_load_end_with_the_command(run: Callable[[str], Run]) -> None:
    job = run("slow start")
    for worker in (0, 1):
        job.number(f"worker-{worker}")
    job.process.kill()
    assert not job.left()


def test_nothing_stays_in_shared_memory(run: Callable[[str], Run]) -> None:
    """Not even where everything was killed at once, also what would clean up."""
    job = run("long")
    job.number("shard-1")
    os.killpg(job.process.pid, signal.SIGKILL)
    job.process.wait()
    assert not job.left() and not [one for one in os.listdir("/dev/shm") if f"of-{job.process.pid}-" in one]
