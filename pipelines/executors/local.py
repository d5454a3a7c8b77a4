"""Run shards on this machine: in this process, or in worker processes (one a GPU), each with its own teacher."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from pipelines.spawned import end_with_parent, starting
from teacher_cache import stopping
from teacher_cache.errors import KdcliError
from teacher_cache.stopping import Stopped

_task: Any = None


def worker_count(asked: int) -> int:
    """``asked`` workers, or one a GPU, or one."""
    if asked < 0:
        raise KdcliError(f"--workers must not be negative, got {asked}")
    return asked or max(1, torch.cuda.device_count())


def run(
    make_task: Callable[[int], Callable[[int], Any]], shards: Sequence[int], workers: int
) -> Generator[Any, None, None]:
    """Results of ``task(shard)`` as they end; to be closed by whom does not take them all.

    ``make_task(worker)`` builds a worker's task once (it loads the teacher).
    One worker runs in this process, so its errors and progress are direct. The first error stops the job: what is committed stays. So
    does a signal (``stopping``), to this process or to a worker of it: each worker then ends its shard where that is possible.
    """
    if workers == 1:
        task = make_task(0)
        for shard in shards:
            stopping.check()
            yield task(shard)
        return
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    own: set[Any] = set()
    with starting():  # the process that keeps count of semaphores
        numbers = context.Queue()
    for number in range(workers):
        numbers.put(number)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(make_task, numbers, workers)
    ) as pool:
        try:
            with starting():
                pending = [pool.submit(_run, shard) for shard in shards]
                own = set(multiprocessing.active_children()) - others
            for done in as_completed(pending):
                yield done.result()
        except BrokenProcessPool:
            codes = {one.exitcode for one in own} - {None}
            for number in stopping.SIGNALS:
                if 128 + number in codes and codes <= {128 + each for each in stopping.SIGNALS}:
                    raise Stopped(number) from None  # somebody stopped a worker: the pool ends the others likewise
            raise KdcliError(
                "a worker process died (the first error above, or it was killed for want of memory): "
                "what is committed stays; run the command again, with fewer --workers if memory was short"
            ) from None
        except BaseException as error:
            stopped = isinstance(error, Stopped) or stopping.asked()
            for one in own if stopped else ():
                one.terminate()
            pool.shutdown(wait=bool(stopped), cancel_futures=True)
            raise


def _start(make_task: Callable[[int], Callable[[int], Any]], numbers: Any, workers: int) -> None:
    global _task
    with _ending():
        stopping.listen()
        end_with_parent()
        number = numbers.get()
        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
        _task = make_task(number)


def _run(shard: int) -> Any:
    with _ending(), stopping.held():
        stopping.check()
        return _task(shard)


@contextmanager
def _ending() -> Iterator[None]:
    """A worker that was stopped ends here, its shard behind it: the pool would catch the exception, and wait for it for ever."""
    try:
        yield
    except Stopped as stop:
        for one in multiprocessing.active_children():  # of a teacher that has processes of its own
            one.terminate()
        os._exit(stop.status)
