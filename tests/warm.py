"""Calls in processes of their own that are forked from a warm one: importing torch and transformers takes longer than a tiny run.

They may be signalled, killed and waited for as programs are. What a fork cannot show stays with tests that start a program: that it starts,
from which folder it imports, what torchrun does.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Job:
    """A call: its folder, what its environment has besides; stderr goes to ``errors``, its exit status to ``status``.

    log: stdout goes to ``errors``, too; else it goes nowhere.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    folder: Path
    errors: Path
    status: Path
    environment: Mapping[str, str]
    log: bool


@dataclass(frozen=True)
class Child:
    """A process that leads a group of its own; of ``subprocess.Popen`` what tests call."""

    pid: int
    job: Job

    stdin = None

    def poll(self) -> int | None:
        with suppress(OSError):
            return int(self.job.status.read_text())
        return None

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float = 120.0) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            assert time.monotonic() < deadline, f"still there after {timeout} s: {self.said()}"
            time.sleep(0.005)
        return status

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def said(self) -> str:
        return self.job.errors.read_text()[-3000:]


class Warm:
    """The warm process, begun with the first call, or before what takes the time; it has one thread, and has computed nothing."""

    def __init__(self, folder: Path):
        self.folder, self.calls, self.server = folder, 0, None

    def begin(self) -> subprocess.Popen[bytes]:
        if self.server:
            return self.server
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.server = server = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"], cwd=ROOT, env=environment, **pipes
        )
        assert server.stdout and server.stdout.readline() == b"ready\n"
        return server

    def start(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        folder: Path,
        errors: Path | None = None,
        log: bool = False,
        **environment: str,
    ) -> Child:
        """``function(*arguments)``, of a module that the warm process can import. errors, log: as a ``Job`` has them."""
        server = self.begin()
        self.calls += 1
        errors, status = (errors or self.folder / f"{self.calls}.errors"), self.folder / f"{self.calls}.status"
        errors.touch()
        job = Job(function, arguments, folder, errors, status, environment, log)
        pickle.dump(job, server.stdin)  # type: ignore[arg-type]
        server.stdin.flush()  # type: ignore[union-attr]
        return Child(int(server.stdout.readline()), job)  # type: ignore[union-attr]

    def ranks(self, count: int, function: Callable[..., Any], argument: Any, folder: Path) -> list[Child]:
        """The processes that ``torchrun --nproc-per-node count`` would start, without torchrun."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
        return [
            self.start(function, argument, folder=folder, RANK=str(rank), LOCAL_RANK=str(rank), **world)
            for rank in range(count)
        ]

    def together(self, count: int, line: list[str], folder: Path) -> None:
        """``kdcli`` on so many processes, to its end."""
        ranks = self.ranks(count, kdcli, line, folder)
        try:
            assert [one.wait(280) for one in ranks] == [0] * count, ranks[0].said()
        finally:
            for one in ranks:
                one.kill()

    def close(self) -> None:
        if self.server:
            self.server.stdin.close()  # type: ignore[union-attr]
            self.server.wait(timeout=60)


def kdcli(line: list[str]) -> None:
    import cli

    cli.main(line)


def serve() -> Job:
    """Answers each job with the number of its process. Returns in that process, with the job."""
    while True:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            os._exit(0)
        if os.fork():
            continue
        if not (child := os.fork()):
            return job
        print(child, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        draft = job.status.with_suffix(".draft")
        draft.write_text(str(status))
        draft.replace(job.status)
        os._exit(0)


def become(job: Job) -> None:
    """This process as one that a shell had started there."""
    os.setsid()
    os.chdir(job.folder)
    os.environ.update(job.environment)
    nothing, errors = os.open(os.devnull, os.O_RDWR), os.open(job.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for there, here in ((nothing, 0), (errors if job.log else nothing, 1), (errors, 2)):
        os.dup2(there, here)


if __name__ == "__main__":
    import pipelines.processes.quiet_threads  # noqa: F401 (before torch)
    import tests.warm_modules  # noqa: F401

    print("ready", flush=True)
    mine = serve()
    become(mine)
    result = mine.function(*mine.arguments)
    sys.exit(result if isinstance(result, int) else 0)
