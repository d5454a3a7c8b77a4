"""Tars of an object store on a local disk: each is fetched once whole, checked, shared by all processes of the machine, and evicted
least recently used so that all together stay within a bound.

Files are named by their content (``SHA256.tar``), so whatever stands there under that name is the tar that a commit means, of whichever
cache. What is being read or fetched is locked (flock): neither is evicted, and what a killed process left half-fetched is nobody's.
The folder must lie on a disk of this machine, and be the user's own: what stands there is taken for what was fetched. Links in it are not
followed, and files of other names are neither counted nor removed.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.shards.commit import Commit
from teacher_cache.shards.local_disk import check_own_folder, open_own, take_lock
from teacher_cache.shards.places import local_path
from teacher_cache.shards.staging import told_when_full
from teacher_cache.shards.storage import Storage

FIX = "name a folder of your own on a disk of this machine with --local-cache, or leave it out"
_NAME = re.compile(r"[0-9a-f]{64}\.tar|[0-9a-f]{64}\.\d+\.(part|lock)")
"""Files of ours. Everything else in the folder is somebody's."""
FETCHERS = 4
"""Tars that a process fetches ahead at once."""


class DiskCache:
    """Args: folder: made where it is absent; most_bytes: that all tars in it take, fetched and being fetched."""

    def __init__(self, folder: str | Path, most_bytes: int):
        self.folder, self.most_bytes = local_path(folder, "--local-cache"), most_bytes
        if most_bytes < 1:
            raise KdcliError("--local-cache-gb must be above 0")
        with told_when_full(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
        check_own_folder(self.folder, FIX, links=True)
        self._wanted: deque[tuple[str, Commit]] = deque()
        self._fetchers: list[threading.Thread] = []

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_wanted": deque(), "_fetchers": []}

    def open(self, storage: Storage, column: str, commit: Commit) -> BinaryIO | None:
        """The tar of a commit, open and locked against eviction until it is closed; fetched where it is not there.

        None where there is no room for it beside what is being read: read from the store, then.
        """
        path = self._path(commit)
        for _ in range(10):  # another process may evict it between the fetch and the lock
            if opened := _open_locked(path, commit.tar_bytes):
                return opened
            if not self._fetch(storage, column, commit):
                return None
        return None

    def discard(self, commit: Commit) -> None:
        """Drop a tar whose bytes turned out to be wrong; whoever reads it still has it open."""
        self._path(commit).unlink(missing_ok=True)

    def prefetch(self, storage: Storage, wanted: Sequence[tuple[str, Commit]]) -> None:
        """Fetch (column, commit) tars in the background, in that order, where there is room without evicting one of them; what was wanted
        before and not begun is forgotten. Errors are left to the read that needs the tar.
        """
        self._wanted.clear()
        self._wanted = deque(wanted)
        keep = {self._path(commit) for _, commit in wanted}

        def fetch(left: deque[tuple[str, Commit]]) -> None:
            with suppress(IndexError):  # nothing left
                while True:
                    column, commit = left.popleft()
                    with suppress(KdcliError, OSError):
                        if not self._path(commit).exists():
                            self._fetch(storage, column, commit, keep, wait=False)

        # Daemons: a process that ends does not wait for them; what they leave half-fetched is nobody's.
        count = min(FETCHERS, len(wanted))
        begun = [threading.Thread(target=fetch, args=(self._wanted,), name="fetch", daemon=True) for _ in range(count)]
        self._fetchers = [one for one in self._fetchers if one.is_alive()] + begun
        for one in begun:
            one.start()

    def pause(self) -> None:
        """Begin nothing more and wait for what is being fetched: a process that forks now hands on no locks and no half-done request."""
        self._wanted.clear()
        for one in self._fetchers:
            one.join()
        self._fetchers = []

    def _path(self, commit: Commit) -> Path:
        return self.folder / f"{commit.tar_sha256}.tar"

    def _fetch(
        self, storage: Storage, column: str, commit: Commit, keep: Collection[Path] = (), wait: bool = True
    ) -> bool:
        """Whether the tar is there now. wait: for another process that is fetching it; without, it is left to that one."""
        path, part = self._path(commit), self.folder / f"{commit.tar_sha256}.{commit.tar_bytes}.part"
        with _locked(part.with_suffix(".lock"), wait) as lock:
            if lock is None:
                return False
            part.unlink(missing_ok=True)  # of a killed process: its lock is ours now
            try:
                if _stands(path, commit.tar_bytes):
                    return True
                if not self._make_room(part, commit.tar_bytes, keep):
                    return False
                with told_when_full(self.folder):
                    _download_checked(storage, f"{column}/data/{commit.tar}", part, commit)
                with self._counting():  # who counts meets it under one of its names
                    os.replace(part, path)
                return True
            finally:
                part.unlink(missing_ok=True)
                part.with_suffix(".lock").unlink(missing_ok=True)

    def _counting(self) -> AbstractContextManager:
        """What changes how much the folder holds is done by one process and thread at a time."""
        return _locked(self.folder / "evicting")

    def _make_room(self, part: Path, count: int, keep: Collection[Path]) -> bool:
        """Evict until ``count`` more bytes fit, the longest unused first, and begin ``part``, which counts as whole from now on; False
        where what is in use leaves no room."""
        with self._counting():
            used, idle = 0, []
            for one in self.folder.iterdir():
                if not _NAME.fullmatch(one.name):
                    continue
                with suppress(FileNotFoundError):
                    if one.suffix == ".tar":
                        status = one.lstat()
                        used += status.st_size
                        idle.append((status.st_mtime_ns, one, status.st_size))
                    elif one.suffix == ".lock" and _remove_if_dead(one):
                        one.with_suffix(".part").unlink(missing_ok=True)
                    elif one.suffix == ".part" and not one.with_suffix(".lock").exists():
                        one.unlink()
            parts = [one for one in self.folder.glob("*.part") if _NAME.fullmatch(one.name)]
            used += sum(int(one.suffixes[0][1:]) for one in parts)
            for _, one, size in sorted(idle):
                if used + count <= self.most_bytes:
                    break
                if one not in keep and _remove_if_dead(one):
                    used -= size
            if used + count > self.most_bytes:
                return False
            part.touch()
            return True


def _open_locked(path: Path, size: int) -> BinaryIO | None:
    """The file open under a shared lock, marked as just used; None where it is absent, evicted meanwhile or of another size."""
    try:
        opened = open_own(path)
    except FileNotFoundError:
        return None
    except OSError:  # a link, a pipe: the tar that is fetched takes its name
        return None
    take_lock(opened, path, FIX, shared=True)
    status = os.fstat(opened.fileno())
    if status.st_nlink and status.st_size == size:
        os.utime(opened.fileno())
        return opened
    opened.close()
    if status.st_nlink:
        path.unlink(missing_ok=True)
    return None


def _remove_if_dead(path: Path) -> bool:
    """Remove a file that no process holds a lock on; whether it is gone."""
    try:
        with open_own(path) as opened:
            if not take_lock(opened, path, FIX, wait=False):
                return False
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return True
    except OSError:  # a link, a pipe: not what was written here
        return False
    return True


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[BinaryIO | None]:
    """The file, made where it is absent, open under an exclusive lock; None where another process holds it and ``wait`` is off."""
    while True:
        with open_own(path, os.O_RDWR | os.O_CREAT) as opened:
            if not take_lock(opened, path, FIX, wait=wait):
                yield None
                return
            if _still_named(opened, path):  # who held it before may have renamed or removed what we opened
                yield opened
                return


def _still_named(opened: BinaryIO, path: Path) -> bool:
    try:
        return os.fstat(opened.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _stands(path: Path, size: int) -> bool:
    """Whether a file, no link, of this size has that name."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def _download_checked(storage: Storage, relative: str, target: Path, commit: Commit) -> None:
    """Fetch a tar, once more where its bytes are not the committed ones; CacheError where they still are not."""
    for _ in range(2):
        try:
            storage.download(relative, target)
        except FileNotFoundError:
            raise CacheError(f"{storage}/{relative} is missing; `kdcli cache verify` lists all damage") from None
        with target.open("rb") as fetched:
            if hashlib.file_digest(fetched, "sha256").hexdigest() == commit.tar_sha256:
                return
    raise CacheError(
        f"{storage}/{relative}: fetched twice, and its bytes do not have the checksum of its commit; "
        "`kdcli cache verify` lists all damage"
    )
