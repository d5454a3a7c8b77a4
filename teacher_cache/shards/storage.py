"""One folder behind an fsspec URL, with the two writes a cache needs: whole files, and put-if-absent."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec

from teacher_cache.errors import CacheError, without_secrets
from teacher_cache.shards import staging
from teacher_cache.shards.remote import READ_ONLY, exactly, options, persistently

T = TypeVar("T")
EXTRA = ("s3", "s3a", *READ_ONLY)
"""URL schemes whose libraries come with the extra ``s3``."""


class Storage:
    """Reads and writes below ``url`` (a local path, ``s3://…``, ``gs://…``, ``https://…``). Paths given to it are relative, with ``/``.

    A request to a store is tried again while that may help; then it is a CacheError of one line. FileNotFoundError means: not there.
    """

    def __init__(self, url: str | Path):
        self.url = str(url).rstrip("/") or "/"
        self.scheme = self.url.split("://")[0] if "://" in self.url else "file"
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url, **options(self.scheme))
        except (ImportError, ValueError) as error:
            advice = ": pip install 'kdcli[s3]'" if isinstance(error, ImportError) and self.scheme in EXTRA else ""
            raise CacheError(f"{self}: cannot be opened ({error}){advice}") from None
        self.root = str(self.root).rstrip("/") or "/"
        self.local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))
        self._process = os.getpid()
        if hasattr(self.fs, "retries"):
            self.fs.retries = 2  # s3fs's own, around botocore's and within ours

    def path(self, relative: str) -> str:
        """Where a relative path lies; CacheError where it leaves the cache: documents name files, and anybody can write one."""
        parts = relative.split("/")
        if relative.startswith("/") or ".." in parts or max(map(len, parts)) > 250 or set(relative) & {"\\", "\0"}:
            raise CacheError(
                f"{self}: {relative[:80]!r} is no file of a cache: the document that names it is damaged or hostile"
            )
        return f"{self.root}/{relative}" if relative else self.root

    def __str__(self) -> str:
        """To be shown and written down; ``url`` opens it."""
        return without_secrets(self.url)

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"])  # type: ignore[misc]

    def _ask(self, relative: str, call: Callable[[Any], T]) -> T:
        """``call(file system)``: directly on a disk, persistently elsewhere."""
        if self.local:
            return call(self.fs)
        if self._process != os.getpid():
            self.__init__(self.url)  # type: ignore[misc]  # connections do not survive a fork
        return persistently(f"{self}/{relative}".rstrip("/"), lambda: call(self.fs))

    def exists(self, relative: str) -> bool:
        try:
            self._ask(relative, lambda fs: fs.info(self.path(relative)))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def size(self, relative: str) -> int:
        return int(self._ask(relative, lambda fs: fs.size(self.path(relative))))

    def open(self, relative: str) -> BinaryIO:
        """A file of a local cache to seek in."""
        return self.fs.open(self.path(relative), "rb")

    def read(self, relative: str) -> bytes:
        """Whole content; FileNotFoundError where it is absent."""
        return self._ask(relative, lambda fs: fs.cat_file(self.path(relative)))

    def read_all(self, relatives: Sequence[str]) -> list[bytes]:
        """Whole content of several small files, at once where the store takes it; FileNotFoundError where one is absent."""
        if self.local or not relatives:
            return [self.read(relative) for relative in relatives]
        # s3fs asks for the size first where it may read a file in several pieces.
        whole = {"max_concurrency": 1} if self.scheme in ("s3", "s3a") else {}

        def call(fs: Any) -> list[bytes]:
            found = fs.cat([self.path(relative) for relative in relatives], on_error="return", **whole)
            return _none_failed([found[fs._strip_protocol(self.path(relative))] for relative in relatives])

        return self._ask(relatives[0], call)

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Bytes start … stop − 1 of each (file, start, stop), all requested at once; never fewer or others."""
        paths, starts, stops = ([self.path(name) for name, _, _ in ranges], *zip(*(one[1:] for one in ranges)))

        def call(fs: Any) -> list[bytes]:
            found = _none_failed(fs.cat_ranges(paths, list(starts), list(stops), on_error="return"))
            return [exactly(data, stop - start) for data, start, stop in zip(found, starts, stops)]

        return self._ask(ranges[0][0], call)

    def download(self, relative: str, target: Path) -> None:
        """The whole file as a local one, as the store sends it; its reader checks it."""
        self._ask(relative, lambda fs: fs.get_file(self.path(relative), str(target)))

    @contextmanager
    def local_copy(self, relative: str) -> Iterator[Path]:
        """The file on a local disk: itself, or a copy that is removed afterwards."""
        if self.local:
            yield Path(self.path(relative))
            return
        copy = self.staging() / f"{uuid.uuid4().hex}-{Path(relative).name}"
        try:
            with staging.told_when_full(copy.parent):
                self.download(relative, copy)
            yield copy
        finally:
            copy.unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        """Base names of what lies directly in ``folder``, sorted; empty where it does not exist."""
        self.fs.invalidate_cache(self.path(folder))
        try:
            entries = self._ask(folder, lambda fs: fs.ls(self.path(folder), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        paths = (str(entry).rstrip("/") for entry in entries)
        return sorted(path.rsplit("/", 1)[-1] for path in paths if path != self.path(folder))

    def files(self, folder: str) -> list[str]:
        """Every file below ``folder``, by its path relative to the cache, sorted; empty where it does not exist."""
        self.fs.invalidate_cache()
        found = (str(path) for path in self._ask(folder, lambda fs: fs.find(self.path(folder))))
        return sorted(path[len(self.root) :].lstrip("/") for path in found)

    def remove(self, relative: str) -> None:
        """Remove a file, or a link itself; CacheError where it lies outside of the cache, in a folder that is linked into it."""
        path = self.path(relative)
        if self.local and not _is_inside(os.path.dirname(path), self.root):
            raise CacheError(f"{path} lies outside of the cache, behind a link: remove it there by hand, or the link")
        self._ask(relative, lambda fs: fs.rm_file(path))

    def remove_empty_folders(self, folder: str) -> None:
        """``folder`` and those below it, where nothing is in them; only local disks have such folders."""
        if not self.local:
            return
        for path, _, _ in os.walk(self.path(folder), topdown=False):
            with suppress(OSError):  # somebody writes there
                os.rmdir(path)

    def put_file(self, source: Path, relative: str, durable: bool = True) -> None:
        """Move a finished local file to its place; readers see all of it or nothing.

        Args:
            durable: it survives a power cut, which a disk takes its time for.
        """
        if self.local:
            target = Path(self.path(relative))
            target.parent.mkdir(parents=True, exist_ok=True)
            if durable:
                with source.open("rb") as written:
                    os.fsync(written.fileno())
            os.replace(source, target)
            if durable:
                sync_folder(target.parent)
        else:
            self._refuse_read_only()
            self._ask(relative, lambda fs: fs.put_file(str(source), self.path(relative)))
            source.unlink()

    def put_bytes(self, data: bytes, relative: str, durable: bool = True) -> None:
        """A whole file, atomically; its draft has a name of its own, so that two captures may start at the same time."""
        draft = self.staging() / f"{uuid.uuid4().hex}-{Path(relative).name}"
        try:
            draft.write_bytes(data)
            self.put_file(draft, relative, durable)
        finally:
            draft.unlink(missing_ok=True)  # of a disk that is full

    def put_new(self, relative: str, data: bytes) -> bool:
        """Write ``data`` only where nothing stands yet, in one atomic step; False where another writer was first."""
        if not self.local:
            return self._put_new_remote(relative, data)
        target = Path(self.path(relative))
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.parent / f".{target.name}.{uuid.uuid4().hex}"
        try:
            with draft.open("wb") as written:
                written.write(data)
                written.flush()
                os.fsync(written.fileno())
            try:
                os.link(draft, target)
            except FileExistsError:
                return False
        finally:
            draft.unlink(missing_ok=True)
        sync_folder(target.parent)
        return True

    def _put_new_remote(self, relative: str, data: bytes) -> bool:
        """An answer may be lost after the object was written: then the next try finds its own bytes there, and they are ours."""
        self._refuse_read_only()
        try:
            self._ask(relative, lambda fs: fs.pipe_file(self.path(relative), data, mode="create"))
        except FileExistsError:
            return self.read(relative) == data
        return True

    def _refuse_read_only(self) -> None:
        if self.scheme in READ_ONLY:
            raise CacheError(f"{self} can only be read: write to a folder or an object store")

    def staging(self) -> Path:
        """A local folder for files under construction: beside their target where that is local, so that the move is atomic."""
        if not self.local:
            return staging.own_folder()
        folder = Path(self.root) / ".staging"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _is_inside(folder: str, root: str) -> bool:
    real, inside = os.path.realpath(folder), os.path.realpath(root)
    return os.path.commonpath([real, inside]) == inside


def _none_failed(found: list[Any]) -> list[bytes]:
    """What came, where everything came; else the first error."""
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


def sync_folder(folder: Path) -> None:
    """Make a rename or link in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
