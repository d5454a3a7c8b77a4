"""What a disk of this machine is asked for beyond reading and writing, where some can less: links, locks, names that are given once, and
what survives a power cut. FAT, exFAT, FUSE and some network disks lack one or the other.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from teacher_cache.errors import CacheError, KdcliError

NOT_THERE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system says of a call that it does not have."""
NO_LINKS = (*NOT_THERE, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV)
NO_LOCKS = (*NOT_THERE, errno.ENOLCK, errno.EBADF, errno.EPERM)
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1  # of <fcntl.h> and <linux/fs.h>


def give_name(draft: Path, target: Path) -> bool:
    """Give a finished draft its name in one step, unless that is taken: False then. The draft's own name may be left.

    By a hard link; without these by a rename that replaces nothing; without that under a lock of the folder, which holds among the
    processes of one machine. In each of them the name stands for the whole draft from its first moment on, or for nothing.
    """
    try:
        os.link(draft, target)
    except FileExistsError:
        # A network disk may lose its answer and ask again: then the name is ours. A link to nothing is somebody's.
        return os.path.exists(target) and os.path.samefile(draft, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
    else:
        return True
    renamed = _rename_to_new(draft, target)
    if renamed is not None:
        return renamed
    with _locked_folder(target.parent):
        if os.path.lexists(target):
            return False
        os.rename(draft, target)
        return True


def _rename_to_new(draft: Path, target: Path) -> bool | None:
    """``renameat2`` that replaces nothing; None where system or file system does not have it."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    if not rename(_AT_FDCWD, os.fsencode(draft), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE):
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    if code in NOT_THERE:
        return None
    raise OSError(code, os.strerror(code), str(target))


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        take_lock(
            handle,
            folder,
            "which has no hard links either, so that two writers cannot be kept apart: put the cache on another disk",
        )
        yield
    finally:
        os.close(handle)


def take_lock(opened: BinaryIO | int, place: Path, fix: str, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file (flock) until it is closed; False where another process holds it and ``wait`` is off.

    Raises:
        KdcliError: the disk has no locks; the line names ``place`` and ``fix``.
    """
    try:
        fcntl.flock(opened, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise KdcliError(f"{place}: files cannot be locked on this disk ({error.strerror}), {fix}") from None
    return True


def move(source: Path, target: Path) -> None:
    """Under its new name in one step, also where a folder on the way is linked to another disk."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        draft = target.parent / f".{target.name}.{uuid.uuid4().hex}"
        try:
            shutil.copyfile(source, draft)
            sync_file(draft)
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
        source.unlink()


def make_folder(folder: Path) -> None:
    """The folder and those above it, so that those that are new survive a power cut."""
    new = [one for one in (folder, *folder.parents) if not one.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in reversed(new):
        sync_folder(one.parent)


def sync_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    with path.open("rb") as written:
        os.fsync(written.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename or link in ``folder`` survive a power cut, where the disk knows how; some network disks have nothing to sync there."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (*NOT_THERE, errno.EBADF):
            raise
    finally:
        os.close(handle)


def open_own(path: Path, flags: int = os.O_RDONLY) -> BinaryIO:
    """A regular file opened by its very name: a link raises OSError, as does a pipe, a device or a folder, and none is waited for."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.ELOOP, "is not a regular file", str(path))
    return os.fdopen(handle, "rb" if flags & os.O_ACCMODE == os.O_RDONLY else "r+b")


def check_own_folder(folder: Path, fix: str, links: bool = False) -> None:
    """CacheError where others could have made this folder, or could write into it: what lies there is believed and removed.

    Args:
        fix: what else can be named. links: it may be a link, of one's own.
    """
    link = real = os.lstat(folder)
    with suppress(FileNotFoundError):  # a link to nothing
        real = os.stat(folder)
    reason = ""
    if stat.S_ISLNK(link.st_mode) and not links:
        reason = "is a link, which somebody else may have made"
    elif not stat.S_ISDIR(real.st_mode):
        reason = "is no folder"
    elif {link.st_uid, real.st_uid} != {os.getuid()}:
        reason = "belongs to another user"
    elif real.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        reason = f"can be written to by others (mode {stat.S_IMODE(real.st_mode):o}; `chmod go-w` if it is yours alone)"
    if reason:
        raise CacheError(f"{folder} {reason}: {fix}")


def is_inside(folder: str, root: str) -> bool:
    real, inside = os.path.realpath(folder), os.path.realpath(root)
    return os.path.commonpath([real, inside]) == inside
