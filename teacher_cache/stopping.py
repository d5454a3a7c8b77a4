"""SIGTERM and SIGUSR1, which schedulers send before they take a machine away: the command ends in order, with one line and 128 + signal.

Where nothing is in hand the signal ends the command at once. Work that has a better place to end (a shard, an optimizer step) holds the
signal back and looks for it there.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CONTINUE = "run the same command again to continue"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_number = 0
_held = 0
_lost = False
AGAIN = 0.01
"""Seconds after which a signal comes again that fell into a finalizer."""


class Stopped(SystemExit):
    """A signal asked this process to end. No ``Exception``: what goes on after an error of its own does not go on after this.

    Attributes:
        number: of the signal. status: of the process that ends by it, 128 more. what: became of the work, "" where nobody said it.
    """

    def __init__(self, number: int, what: str = ""):
        super().__init__(number, what)
        self.number = number
        self.code = self.status = 128 + number
        self.what = what

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}{self.what and ': '}{self.what}"


def listen() -> dict[int, Any]:
    """From here on signals mean ``Stopped``; what they meant before. Nothing happens outside of the main thread, which alone gets them."""
    global _number
    if threading.current_thread() is not threading.main_thread():
        return {}
    _number = 0
    if sys.unraisablehook is not _unraisable:
        _hooks.append(sys.unraisablehook)
        sys.unraisablehook = _unraisable
    before: dict[int, Any] = {number: signal.signal(number, _ask) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return before


@contextmanager
def listening() -> Iterator[None]:
    """``listen`` in this block; within another one nothing more."""
    global _number
    if signal.getsignal(SIGNALS[0]) is _ask:
        yield
        return
    before = listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if before and _hooks:
            sys.unraisablehook = _hooks.pop()
        _number = 0


def asked() -> int:
    """The signal that asked to stop, 0 for none."""
    return _number


def check(what: str = "") -> None:
    """Stopped where a signal has asked for it.

    Args:
        what: becomes of the work, for the line that is printed.
    """
    if _number:
        raise Stopped(_number, what)


@contextmanager
def held() -> Iterator[None]:
    """Signals wait in this block, until ``check`` or its end."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1
    if not _held:
        check()


def _ask(number: int, frame: object) -> None:
    """A second signal changes nothing: schedulers send several, to every process, and what stops already must not be disturbed."""
    global _number, _lost
    first, _number, _lost = _lost or not _number, _number or number, False
    if first and not _held:
        raise Stopped(number)


_hooks: list[Any] = []
"""``sys.unraisablehook`` as it was."""


def _unraisable(told: Any) -> None:
    """Python drops what is raised inside a finalizer: there the signal waits until that is over, and nothing is printed."""
    global _lost
    if not isinstance(told.exc_value, Stopped):
        _hooks[-1](told)
        return
    _lost = True
    again = threading.Timer(AGAIN, signal.pthread_kill, (threading.main_thread().ident, told.exc_value.number))
    again.daemon = True
    again.start()
