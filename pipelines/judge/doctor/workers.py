"""Who examines the doctor's rows: threads where only pictures are decoded, processes where a tokenizer reads every row."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from pipelines.judge.doctor.rows import RowExaminer, Tally
from pipelines.processes.spawned import starting
from teacher_cache import stopping
from teacher_cache.parent import end_with_parent
from teacher_cache.records import RowGroup

ROWS_A_PROCESS = 4_000
"""A process is ready after some five seconds, in which one that is reads about half as many rows."""

Submit = Callable[[int, RowGroup], "Future[Tally]"]
_examiner: RowExaminer | None = None


@contextmanager
def working(examiner: RowExaminer, rows: int, workers: int | None) -> Iterator[Submit]:
    """``submit(part number, group)``.

    Args:
        rows: of the whole mixture: a small one is read by this process. workers: default one a core.
    """
    cores = workers or len(os.sched_getaffinity(0))
    if examiner.reading is None:  # Pillow decodes outside the interpreter's lock
        with ThreadPoolExecutor(cores) as threads:
            yield lambda part, group: threads.submit(examiner, part, group)
        return
    count = workers or max(1, min(cores, rows // ROWS_A_PROCESS))
    if count == 1:
        # One alone: a tokenizer raises "Already borrowed" where two threads meet in it.
        with ThreadPoolExecutor(1) as one:
            yield lambda part, group: one.submit(examiner, part, group)
        return
    context = multiprocessing.get_context("spawn")
    started = (examiner.specs, examiner.reading)
    with ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=started) as processes:

        def submit(part: int, group: RowGroup) -> Future[Tally]:
            with starting():  # a pool starts a process when it has work for it
                return processes.submit(_examine, part, group)

        yield submit


def _start(*arguments: Any) -> None:
    """In a new process."""
    global _examiner
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent says what happens
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.SIGNALS)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()  # the parent has loaded the same model, and said it once
    _examiner = RowExaminer(*arguments)


def _examine(part: int, group: RowGroup) -> Tally:
    assert _examiner is not None
    return _examiner(part, group)
