"""Signals of a DataLoader's processes: they end with their parent, and by nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from teacher_cache.parent import end_with_parent


@contextmanager
def own_child_signals() -> Iterator[None]:
    """PyTorch's loader installs a handler that raises wherever this process is when one of its processes dies, in the middle of a step or
    of a checkpoint. ``_next`` notices that itself, within seconds. One that an earlier loader of this program left goes, too."""
    before = signal.getsignal(signal.SIGCHLD)
    if getattr(before, "__module__", "").startswith("torch.utils.data"):
        before = signal.SIG_DFL
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


@contextmanager
def held_back() -> Iterator[None]:
    """Around the start of loader processes: SIGTERM waits in each of their threads, those of libraries that they import too."""
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # whose own start lets SIGTERM through again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def leave_signals(worker: int) -> None:
    """Schedulers send their signals to every process. A loader process that ended by one would break the step behind which a checkpoint
    is to be written: it ends by its parent's alone, and with its parent."""
    end_with_parent()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent() -> None:
    started = multiprocessing.parent_process()  # under forkserver none that getppid knows
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != (started.pid if started else os.getppid()):
        pass
    os._exit(0)
