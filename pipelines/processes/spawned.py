"""Processes that are started anew: not from the user's folder, and deaf to signals until they listen."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from teacher_cache import stopping

GRACE_SECONDS = 60.0
"""For a child to end in order: to write its checkpoint."""


@contextmanager
def starting() -> Iterator[None]:
    """Around the start of interpreters: the current folder is not on their path, where a user may have a socket.py, and signals wait
    until they listen; Ctrl-C is for who started them."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        resource_tracker.ensure_running()  # whose own start lets SIGTERM and SIGINT through again
        signal.pthread_sigmask(signal.SIG_BLOCK, [*stopping.SIGNALS, signal.SIGINT])
        yield
    finally:
        os.environ.pop("PYTHONSAFEPATH")
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # the last: a signal that has waited comes now


def end_with_starter() -> None:
    """To be called in a program whose stdin is a pipe that its starter holds open: it gets SIGTERM once that one is gone, however it
    ended, and is killed with its own session where it does not end in time."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_wait_for_starter, daemon=True).start()


def _wait_for_starter() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
