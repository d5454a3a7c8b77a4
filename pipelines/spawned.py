"""Processes that are started anew: not from the user's folder, and deaf to signals until they listen."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from teacher_cache import stopping


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
