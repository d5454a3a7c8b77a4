"""The local folder in which tars grow before they are uploaded: one a process, bounded, and removed once its process is surely dead.

It lies in the machine's temporary folder (``TMPDIR`` chooses another), where others may write, too: what is found under its name is
looked at before it is used, links in it are not followed, and only files of the names that are given here are removed. A process holds a
lock on its folder for as long as it lives; the next process of the machine takes away what nobody holds.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from teacher_cache.errors import CacheError
from teacher_cache.shards.local_disk import check_own_folder, open_own, take_lock

LOCK = "lock"
FIX = "set TMPDIR to a folder of your own"
_FOLDER = re.compile(r"\d+-[0-9a-f]{8}")
_FILE = re.compile(r"[0-9a-f]{32}-[\w.-]+|[\w.-]+-\d{6,}-[0-9a-f]{32}\.tar")
"""Names of a process's folder, and of what ``Storage`` and ``ShardWriter`` write in it."""
_own: tuple[int, Path, BinaryIO] | None = None
"""(process, folder, held lock)."""


def base() -> Path:
    """Where the folders of all processes of this user lie. CacheError where ``TMPDIR`` names no folder: Python would take another one
    without a word, whose disk may be too small."""
    if (named := os.environ.get("TMPDIR")) and not os.path.isdir(named):
        raise CacheError(f"TMPDIR names {named!r}, which is not a folder: create it, or name another one")
    return Path(tempfile.gettempdir()) / f"kdcli-staging-{os.getuid()}"


def own_folder() -> Path:
    """This process's folder, made and locked at its first use; folders of dead processes go then. CacheError where another user has, or
    could have, a hand in it."""
    global _own
    if _own is None or _own[0] != os.getpid() or not _own[1].is_dir():
        with suppress(FileExistsError):
            base().mkdir(parents=True, mode=0o700)
        check_own_folder(base(), f"remove it, or {FIX}")
        _remove_dead(base())
        folder = base() / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        draft = base() / f".{folder.name}"  # locked before it has a name that others look at
        draft.mkdir(mode=0o700)
        lock = open_own(draft / LOCK, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        take_lock(lock, draft, FIX)
        draft.rename(folder)
        _own = os.getpid(), folder, lock
    return _own[1]


def _remove_dead(folder: Path) -> None:
    for left in folder.iterdir():
        if _FOLDER.fullmatch(left.name) and not left.is_symlink():
            with suppress(OSError), open_own(left / LOCK) as lock:
                if take_lock(lock, left, FIX, wait=False):
                    _remove_own(left)


def _remove_own(folder: Path) -> None:
    """The files that a process of ours leaves, and the folder where nothing else is in it; whatever takes its place meanwhile stays."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name in sorted(os.listdir(handle), key=LOCK.__eq__):  # the lock last
            if name == LOCK or _FILE.fullmatch(name):
                os.unlink(name, dir_fd=handle)  # a link goes, what it leads to stays
    finally:
        os.close(handle)
    os.rmdir(folder)


def check_room(folder: Path, most_bytes: int) -> None:
    """Before a shard: CacheError where the disk has less free than the bound promises. 0: no bound."""
    free = shutil.disk_usage(folder).free
    if most_bytes and free < most_bytes:
        raise CacheError(
            f"{folder}: {free / 1e9:.1f} GB are free, staging may take {most_bytes / 1e9:.1f} GB: make room, set TMPDIR to another disk, "
            "or lower --staging-gb"
        )


def check_bound(folder: Path, most_bytes: int) -> None:
    """While a shard grows: CacheError where this process's tars take more than the bound. 0: no bound."""
    if most_bytes and (used := sum(one.stat().st_size for one in folder.glob("*.tar"))) > most_bytes:
        raise CacheError(
            f"{folder}: the tars of one shard take {used / 1e9:.3f} GB and more, staging may take {most_bytes / 1e9:.3f} GB: "
            "raise --staging-gb, or make the cache with more --shards"
        )


@contextmanager
def told_when_full(folder: Path | str) -> Iterator[None]:
    """A full disk as one line that names the folder; what is committed stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CacheError(
            f"{folder}: {error.strerror}: make room there (or set TMPDIR to another disk, if the cache is in an object store), "
            "then run the command again: it continues after the last committed shard"
        ) from None
