"""Run shards on this machine: in this process, or in worker processes (one a GPU), each with its own teacher."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from teacher_cache.errors import KdcliError

_task: Any = None


def worker_count(asked: int) -> int:
    """``asked`` workers, or one a GPU, or one."""
    if asked < 0:
        raise KdcliError(f"--workers must not be negative, got {asked}")
    return asked or max(1, torch.cuda.device_count())


def run(make_task: Callable[[int], Callable[[int], Any]], shards: Sequence[int], workers: int) -> Iterator[Any]:
    """Results of ``task(shard)`` as they end. ``make_task(worker)`` builds a worker's task once (it loads the teacher).

    One worker runs in this process, so its errors and progress are direct. The first error stops the job: what is committed stays.
    """
    if workers == 1:
        task = make_task(0)
        for shard in shards:
            yield task(shard)
        return
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(workers):
        numbers.put(number)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(make_task, numbers, workers)
    ) as pool:
        try:
            with _safe_path():
                pending = [pool.submit(_run, shard) for shard in shards]
            for done in as_completed(pending):
                yield done.result()
        except BrokenProcessPool:
            raise KdcliError(
                "a worker process died (the first error above, or it was killed for want of memory): "
                "what is committed stays; run the command again, with fewer --workers if memory was short"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _safe_path() -> Iterator[None]:
    """Interpreters that are started here do not begin with the current folder on their path: a user may have a queue.py there."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        os.environ.pop("PYTHONSAFEPATH")
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before


def _start(make_task: Callable[[int], Callable[[int], Any]], numbers: Any, workers: int) -> None:
    global _task
    number = numbers.get()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
    _task = make_task(number)


def _run(shard: int) -> Any:
    return _task(shard)
