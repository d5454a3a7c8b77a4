"""A process ends with the one that started it. Who was killed can tell its children nothing, and a teacher without a command keeps its GPU.

The kernel could be asked for a signal instead (``PR_SET_PDEATHSIG``), on Linux alone; it comes when the *thread* ends that started the
process, which then ends beside a parent that goes on.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from typing import Any

SECONDS = 0.5
"""Between two looks, where the end of the parent is not told."""
_started_by = os.getppid()
"""Of the process that imported this: who was gone before is not known any more."""
_watching = 0


def end_with_parent(grace: float = 0.0, number: int | None = None) -> None:
    """Watch the parent from here on, whichever way this process was started (spawn, fork, forkserver, or a program of its own).

    Args:
        grace: once the parent is gone this process gets SIGTERM, and the system ends it so many seconds later, whatever it is at then;
            0: it ends at once.
        number: of the parent's process, where this one is a bare fork.
    """
    global _watching
    if _watching != os.getpid():  # a fork has no threads
        _watching = os.getpid()
        mask = signal.pthread_sigmask(
            signal.SIG_BLOCK, signal.valid_signals()
        )  # which the thread inherits: signals are for others
        threading.Thread(target=_watch, args=(grace, number), name="parent", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _watch(grace: float, number: int | None) -> None:
    started = None if number else multiprocessing.parent_process()
    _wait(started, number or (started and started.pid) or _started_by)
    if not grace:
        os._exit(128 + signal.SIGTERM)
    signal.setitimer(
        signal.ITIMER_REAL, grace
    )  # SIGALRM ends the process, also where Python does not come to its handlers
    os.kill(os.getpid(), signal.SIGTERM)


def _wait(started: Any, number: int) -> None:
    """Until the parent is gone: the pipe that it held is closed, or this process has another one.

    A pipe alone is not enough: a child that was forked later holds it, too. Under forkserver the parent is nobody's parent.
    """
    direct = not started or os.getppid() == number
    while os.getppid() == number if direct else _exists(number):
        if not started:
            time.sleep(SECONDS)
        elif multiprocessing.connection.wait([started.sentinel], SECONDS):
            return


def _exists(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return True
