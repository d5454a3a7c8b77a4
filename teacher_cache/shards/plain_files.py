"""What may be read of a cache that anybody may have made: regular files only, opened without waiting, and no longer than their kind can be.

A pipe, a device or a link to one waits for ever or never ends; a sparse file of 30 GB takes no disk, and all memory. So type and size are
looked at before a byte is read. Links to regular files are followed: what is behind one has its checksum like any other.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from teacher_cache.errors import CacheError

MIB = 1 << 20
MOST_MANIFEST = 128 * MIB
"""Bytes: groups of 300 million rows."""
MOST_DESCRIPTION = 4 * MIB
"""Of a ``field.json``."""
MOST_COMMIT = 64 * MIB
"""Skip records of 150,000 rows."""
MOST_INDEX = 128 * MIB
MOST_WORD = MIB // 16
"""Of what a worker says of itself."""
MOST_CALIBRATION = 2048 * MIB
"""A basis of 16,384 × 16,384 float32 twice."""
MOST_HEAD = 8192 * MIB
"""262,144 tokens × 8,192 float32; of a low-rank head likewise."""
MOST_OTHER = 256 * MIB
"""Tokenizers, receipts, canaries."""
AT_ONCE = 1024 * MIB
"""Most that is asked of a store at the same time."""


class StrangeFile(CacheError):
    """What stands there is no file of a cache: of another type, or too long."""


def most_bytes(relative: str) -> int:
    """How long a file of a cache may be, by its path."""
    folder, _, name = relative.rpartition("/")
    kind = folder.rpartition("/")[2]
    if kind == "calibration":
        return MOST_HEAD if "-low_rank_head-" in name else MOST_CALIBRATION
    by_folder = {"commits": MOST_COMMIT, "index": MOST_INDEX, "progress": MOST_WORD}
    by_name = {"manifest.json": MOST_MANIFEST, "field.json": MOST_DESCRIPTION, "head.safetensors": MOST_HEAD}
    return by_folder.get(kind) or by_name.get(name) or MOST_OTHER


def refuse_long(place: str, size: int, most: int) -> None:
    """StrangeFile where a file is longer than one of its kind can be."""
    if size > most:
        raise StrangeFile(
            f"{place}: more than {most:,} bytes, which no such file of a cache has: it was not written by kdcli, or is damaged; restore it"
        )


def is_there(path: str | Path) -> bool:
    """Whether anything stands at a path, whatever it is; not behind a link to nothing."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def regular_size(path: str | Path) -> int:
    """Bytes of a regular file, or of the one that a link leads to.

    Raises:
        FileNotFoundError, NotADirectoryError: nothing is there.
        StrangeFile: it is not a regular file. CacheError: the disk does not say.
    """
    try:
        return _size_of(path, os.stat(path))
    except OSError as error:
        raise _unreadable(path, error) from None


def open_plain(path: str | Path) -> io.BufferedReader:
    """A regular file to read and seek in; raises what ``regular_size`` does, and never waits for a writer."""
    regular_size(path)  # first: to open a device can do something already
    try:
        opened = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        _size_of(path, os.fstat(opened.fileno()))  # it may have been exchanged
    except CacheError:
        opened.close()
        raise
    return opened


def read_plain(path: str | Path, most: int = MOST_OTHER) -> bytes:
    """The whole of a regular file of at most ``most`` bytes; raises what ``regular_size`` does, and StrangeFile for a longer one."""
    with open_plain(path) as opened:
        refuse_long(str(path), os.fstat(opened.fileno()).st_size, most)
        try:
            data = opened.read(most + 1)
        except OSError as error:
            raise _unreadable(path, error) from None
    refuse_long(str(path), len(data), most)  # it may grow
    return data


def _size_of(path: str | Path, found: os.stat_result) -> int:
    if not stat.S_ISREG(found.st_mode):
        raise StrangeFile(
            f"{path}: {_kind(found.st_mode)}, not a file: remove it, then `kdcli cache verify` says what is lost"
        )
    return found.st_size


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((name for is_one, name in kinds.items() if is_one(mode)), "something else")


def _unreadable(path: str | Path, error: OSError) -> Exception:
    """Absence stays what it is; whatever else a disk says is one line."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return error
    return CacheError(
        f"{path}: {error.strerror or error}: it cannot be read: look at its permissions, its links and the disk"
    )
