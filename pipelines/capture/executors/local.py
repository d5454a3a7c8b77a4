"""Run shards on this machine: in this process, or in worker processes (one a GPU), each with its own teacher.

A worker is on a pipe of its own, and there is nothing else between processes, no lock and no queue: whoever is killed, the other end
reads the end of the pipe. (A process pool's workers can wait for ever for a lock that was held by who is gone.)
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any

from pipelines.processes.spawned import starting
from teacher_cache import stopping
from teacher_cache.errors import KdcliError
from teacher_cache.parent import end_with_parent
from teacher_cache.stopping import Stopped

MakeTask = Callable[[int], Callable[[int], Any]]
GRACE = 60.0
"""Seconds for what a worker ends in order, a batch of the teacher or a commit; then it is killed."""
LOOK = 5.0
"""Seconds after which workers are looked at, should one be gone whose pipe a process of its own still holds."""
START = -1
"""In a shard's place: the worker is building its task."""


def worker_count(asked: int) -> int:
    """``asked`` workers, or one a GPU, or one."""
    import torch

    if asked < 0:
        raise KdcliError(f"--workers must not be negative, got {asked}")
    return asked or max(1, torch.cuda.device_count())


def run(make_task: MakeTask, shards: Sequence[int], workers: int) -> Generator[Any, None, None]:
    """Results of ``task(shard)`` as they end; to be closed by whom does not take them all.

    ``make_task(worker)`` builds a worker's task once (it loads the teacher).
    One worker runs in this process, so its errors and progress are direct. The first error stops the job: what is committed stays, and
    the other workers end the shard that they are at. So does a signal (``stopping``), to this process or to a worker of it, an
    interrupt, and a worker that dies: each worker then ends where that is possible next, and is killed after ``GRACE`` seconds.
    """
    if workers == 1:
        task = make_task(0)
        for shard in shards:
            stopping.check()
            yield task(shard)
        return
    pool, at_once = list[LocalWorker](), True
    try:
        with starting():
            for number in range(workers):
                pool.append(start(make_task, number, workers))
        yield from results(pool, deque(shards))
        at_once = False
    except Exception as error:
        at_once = isinstance(error, WorkerDied)
        raise
    finally:
        end(pool, at_once)


@dataclass
class LocalWorker:
    """The command's side of a worker. ``shard``: what it is at; None: nothing."""

    number: int
    process: Any
    line: Connection
    shard: int | None = START


class WorkerDied(KdcliError):
    """Killed, for want of memory or by somebody."""


def start(make_task: MakeTask, number: int, workers: int) -> LocalWorker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # As bytes: what the task imports comes in behind the worker's own first steps.
    process = context.Process(
        target=work, args=(theirs, pickle.dumps(make_task), number, workers), name=f"worker-{number}"
    )
    process.start()
    theirs.close()
    return LocalWorker(number, process, ours)


def results(pool: Sequence[LocalWorker], left: deque[int]) -> Iterator[Any]:
    """One shard a worker at a time, in the order given."""
    while left or any(one.shard not in (None, START) for one in pool):
        for one in answered(pool):
            done, value = hear(one)
            if not done:
                raise value
            shard, one.shard = one.shard, None
            if left:
                one.shard = left.popleft()
                with suppress(OSError):  # it is gone, which is heard next
                    one.line.send(one.shard)
            if shard != START:
                yield value


def answered(pool: Sequence[LocalWorker]) -> list[LocalWorker]:
    """Workers at work that have said something or are gone."""
    busy = [one for one in pool if one.shard is not None]
    ready = wait_for([one.line for one in busy], LOOK)
    return [one for one in busy if one.line in ready or not one.process.is_alive()]


def hear(one: LocalWorker) -> tuple[bool, Any]:
    """(True, result) or (False, the task's error)."""
    try:
        if one.line.poll():
            return one.line.recv()
    except (EOFError, OSError):
        pass
    raise gone(one)


def gone(one: LocalWorker) -> Exception | Stopped:
    """What is to be said of a worker that ended unasked."""
    one.process.join(LOOK)
    code = one.process.exitcode
    if code is not None and code - 128 in tuple(stopping.SIGNALS):
        return Stopped(code - 128)  # somebody stopped a worker: the others are ended likewise
    how = f"exit status {code}" if code is None or code >= 0 else f"killed by {signal.Signals(-code).name}"
    where = "while it loaded its task" if one.shard == START else f"at shard {one.shard:06d}"
    return WorkerDied(
        f"worker {one.number} died {where} ({how}; SIGKILL may mean that memory ran out): committed shards are kept; run the command "
        "again, with fewer --workers if memory ran out"
    )


def end(pool: Sequence[LocalWorker], at_once: bool) -> None:
    """No worker is left behind. A second interrupt kills what the first asked to end."""
    for one in pool:
        one.line.close()  # who waits for a shard ends by that
    try:
        for one in [] if at_once else [one for one in pool if one.shard != START]:
            one.process.join(GRACE if one.shard is None else None)
    finally:
        try:
            for one in pool:
                one.process.terminate()
            deadline = time.monotonic() + GRACE
            for one in pool:
                one.process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for one in pool:
                one.process.kill()
                one.process.join()


# ---- in a worker


def work(line: Connection, pickled: bytes, number: int, workers: int) -> None:
    """A worker's life: it ends when the command has closed its end of the line, by a signal, or with the command."""
    end_with_parent(GRACE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the command says what happens
    for one in stopping.SIGNALS:
        signal.signal(one, leave)  # nothing is in hand yet, and what is imported may catch any exception
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.SIGNALS)
    try:
        make_task = pickle.loads(pickled)
        share_cores(workers)
        task = make_task(number)
    except Exception as error:
        tell(line, False, error)
        return
    try:
        stopping.listen()
        tell(line, True, None)
        with suppress(EOFError, OSError):
            while True:
                shard = line.recv()
                with stopping.held():
                    stopping.check()
                    try:
                        done, value = True, task(shard)
                    except Exception as error:
                        done, value = False, error
                tell(line, done, value)
    except Stopped as stop:
        leave(stop.number)


def leave(number: int, frame: object = None) -> None:
    """End here, whatever is still under way in threads."""
    for one in multiprocessing.active_children():  # of a teacher that has processes of its own
        one.terminate()
    os._exit(128 + number)


def share_cores(workers: int) -> None:
    """A task that computes has imported torch."""
    torch = sys.modules.get("torch")
    if torch and not torch.cuda.is_available():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))


def tell(line: Connection, done: bool, value: Any) -> None:
    """What became of the work. An error that does not travel goes as its words; one that is not ours brings where it was raised."""
    if not done and not isinstance(value, KdcliError):
        value.add_note("".join(traceback.format_exception(value)))
    try:
        said = pickle.dumps((done, value))
        pickle.loads(said)
    except Exception as error:
        lost = value if not done else error
        said = pickle.dumps((False, RuntimeError("".join(traceback.format_exception(lost)))))
    with suppress(OSError):  # nobody listens any more
        line.send_bytes(said)
