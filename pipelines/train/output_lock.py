"""One writer a folder: a lock that ends with its process, and a word in it that says who holds it.

The lock is the kernel's (``flock`` on ``FOLDER/.lock``), so a killed holder frees it at once. Where machines share a disk that does not
carry locks between them, the word counts: its holder renews it every few seconds, and who finds another machine's word in a free lock
watches whether it is renewed before it takes the folder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from student_train.whole import make_folder
from teacher_cache.errors import KdcliError, printable

NAME = ".lock"
BEAT_SECONDS = 5.0
"""Between two renewals of a holder's word."""
SILENT_SECONDS = 30.0
"""A holder on another machine whose word is not renewed for so long is dead."""
SIZE = 512
"""Bytes of the word: always as many, so that it is renewed in one write."""
HELD = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def alone(folder: Path, what: str, choose: str, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """In this block nobody else writes to ``folder``, which is made where it is not there yet.

    Args:
        what: writes there, in the line that the second one gets. choose: the flag that names another folder.
        say: gets a note where another machine's word has to be watched.

    Raises:
        Held: somebody holds it: who, where, and since when.
    """
    make_folder(folder)
    with _open(folder / NAME) as file, _let_go_in_children(file):
        _take(file, folder, choose, say)
        ended = threading.Event()
        mine = {
            "what": what,
            "host": socket.gethostname(),
            "machine": _machine(),
            "process": os.getpid(),
            "since": _now(),
        }
        _write(file, mine)
        beat = threading.Thread(target=_renew, args=(file, mine, ended), name="lock", daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            _write(file, {})  # left in order: nobody has to watch it


def _open(path: Path) -> BinaryIO:
    """Never a link: a folder may be somebody else's archive, and what it points to would be written over."""
    try:
        return os.fdopen(
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+b", buffering=0
        )
    except OSError as error:
        raise KdcliError(
            f"{path}: {error.strerror}: this file locks the folder for one writer: make it writable"
        ) from None


def _take(file: BinaryIO, folder: Path, choose: str, say: Callable[[str], None]) -> None:
    locks = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise _refusal(folder, _read(file), choose) from None
        locks = False  # the file system has none: the word alone is left
    word = _read(file)
    if not word or (locks and word.get("machine") == _machine()):  # left in order, or by a dead process of this machine
        return
    say(
        f"note: {folder} was left by {_holder(word)} without a word: watching for {SILENT_SECONDS:.0f} s whether it still runs there"
    )
    until = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < until:
        time.sleep(min(0.5, SILENT_SECONDS / 4))
        with _open(folder / NAME) as anew:  # another machine's writes are seen by whoever opens the file
            if (there := _read(anew)) and there != word:
                raise _refusal(folder, there, choose)
            if not there:
                return


class Held(KdcliError):
    """Somebody else writes there, who may come to an end."""


def _refusal(folder: Path, word: dict[str, Any], choose: str) -> Held:
    return Held(f"{folder}: {_holder(word)} writes there: wait for it, end it, or choose another {choose}")


def _holder(word: dict[str, Any]) -> str:
    """From what the word says, which may be half a word of one who has just begun."""
    if not word:
        return "another process, which has just begun,"
    what, host, process, since = (
        printable(str(word.get(one, "?")))[:80] for one in ("what", "host", "process", "since")
    )
    return f"{what} (host {host}, process {process}, since {since})"


def _read(file: BinaryIO) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        body = json.loads(os.pread(file.fileno(), SIZE, 0))
        return body if isinstance(body, dict) else {}
    return {}


def _write(file: BinaryIO, word: dict[str, Any]) -> None:
    """A disk that is full or gone is the business of whoever writes there."""
    with suppress(OSError):
        os.pwrite(file.fileno(), json.dumps(word).encode()[:SIZE].ljust(SIZE), 0)
        os.fsync(file.fileno())


def _renew(file: BinaryIO, word: dict[str, Any], ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(BEAT_SECONDS):
        beat += 1
        _write(file, {**word, "beat": beat})


@contextmanager
def _let_go_in_children(file: BinaryIO) -> Iterator[None]:
    """A forked child (a loader process) would hold the lock on for a while where its parent is killed."""
    number, held = file.fileno(), True

    def let_go() -> None:
        nonlocal held
        if (
            held
        ):  # also where the parent is dead before the child first runs; a child's own children have nothing to let go
            held = False
            other = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(
                other, number, inheritable=False
            )  # the number stays taken: whoever closes it later closes nothing else
            os.close(other)

    os.register_at_fork(after_in_child=let_go)
    try:
        yield
    finally:
        held = False


def _machine() -> str:
    """The same for all processes that one kernel runs, also in containers: its locks are theirs."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
