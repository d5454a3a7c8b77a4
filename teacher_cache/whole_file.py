"""One file on a local disk, written whole or not at all: a draft beside its place, to the disk, then under its name.

A process that is killed leaves its draft; the next one that writes the same file takes it away. Drafts are locked while they are
written, so that two writers never mix and never take each other's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from teacher_cache.errors import DiskError, advice
from teacher_cache.shards.local_disk import sync_folder


def write_whole(path: Path, content: bytes | str, durable: bool = True) -> None:
    """Write ``path``: whoever reads it sees all of the new content or all of the old one.

    Folders above it are made, a link is followed, permissions stay. What is no plain file (a device, a pipe) is written to as it is.

    Args:
        content: text is written as UTF-8; halves of surrogate pairs as JSON writes them.
        durable: it survives a power cut, which a disk takes its time for.

    Raises:
        DiskError: names the file, the reason and what helps; no draft is left, and what was there before stays.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with naming_file(path):
        if is_special(path):
            _write_special(path, data)
            return
        place = Path(os.path.realpath(path))
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = _draft(place)
        try:
            with os.fdopen(handle, "wb") as opened:
                opened.write(data)
                opened.flush()
                if durable:
                    os.fsync(handle)
                if place.exists():
                    os.fchmod(handle, stat.S_IMODE(place.stat().st_mode))
                os.replace(draft, place)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        if durable:
            sync_folder(place.parent)


def refuse_unwritable(path: Path) -> None:
    """Before long work whose result goes to ``path``: DiskError where it could not be written now, for another reason than its size."""
    with naming_file(path):
        if is_special(path):
            return
        place = Path(os.path.realpath(path))
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = _draft(place)
        draft.unlink()
        os.close(handle)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Around what writes ``path``: an error of the disk becomes one line that names it, the reason, and what helps."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DiskError(f"{path}: cannot be written ({reason}): {advice(error)}") from None


def is_special(path: Path) -> bool:
    """Whether something stands there that cannot be replaced, and must not be: a device, a pipe, what another process has open
    (``/dev/stdout``)."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    parts = Path(os.path.abspath(path)).parts[1:3]
    opened = parts[:1] == ("proc",) or (parts[:1] == ("dev",) and parts[1:] != ("shm",))
    return not stat.S_ISDIR(mode) and (opened or not stat.S_ISREG(mode))


def _write_special(path: Path, data: bytes) -> None:
    """A pipe that nobody reads is an error (ENXIO), not a wait without end."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(handle, True)
    with os.fdopen(handle, "wb", buffering=0) as opened:
        while data:
            data = data[opened.write(data) :]


def _draft(place: Path) -> tuple[int, Path]:
    """A new draft beside ``place``, open and locked; drafts of dead writers of the same file go."""
    stem = f".{place.name[:100]}.draft-"
    for left in place.parent.iterdir():
        if left.name.startswith(stem):
            _remove_dead(left)
    while True:
        draft = place.parent / f"{stem}{uuid.uuid4().hex[:12]}"
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # a file system without locks: nobody there takes drafts away
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, draft
        os.close(handle)  # another writer took it for dead before it was locked


def _remove_dead(draft: Path) -> None:
    with suppress(OSError):
        handle = os.open(draft, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it is being written
            draft.unlink()
        finally:
            os.close(handle)
