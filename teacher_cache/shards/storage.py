"""One folder behind an fsspec URL, with the two writes a cache needs: whole files, and put-if-absent."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from teacher_cache.errors import CacheError

OPTIONS: dict[str, dict[str, Any]] = {
    # A job of a million requests meets every hiccup there is; the library backs off and tries again.
    "s3": {"config_kwargs": {"retries": {"mode": "standard", "max_attempts": 10}}},
}
"""URL scheme → what its file system is opened with."""


class Storage:
    """Reads and writes below ``url`` (a local path, ``s3://…``, ``gs://…``). Paths given to it are relative, with ``/``."""

    def __init__(self, url: str | Path):
        self.url = str(url).rstrip("/") or "/"
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url, **OPTIONS.get(self.url.split("://")[0], {}))
        except (ImportError, ValueError) as error:
            raise CacheError(f"{self.url}: cannot be opened ({error})") from None
        self.local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def path(self, relative: str) -> str:
        """Where a relative path lies; CacheError where it leaves the cache: documents name files, and anybody can write one."""
        parts = relative.split("/")
        if relative.startswith("/") or ".." in parts or max(map(len, parts)) > 250 or set(relative) & {"\\", "\0"}:
            raise CacheError(
                f"{self}: {relative[:80]!r} is no file of a cache: the document that names it is damaged or hostile"
            )
        return f"{self.root}/{relative}" if relative else self.root

    def __str__(self) -> str:
        return self.url

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"])  # type: ignore[misc]

    def exists(self, relative: str) -> bool:
        return bool(self.fs.exists(self.path(relative)))

    def size(self, relative: str) -> int:
        return int(self.fs.size(self.path(relative)))

    def open(self, relative: str) -> BinaryIO:
        return self.fs.open(self.path(relative), "rb")

    def read(self, relative: str) -> bytes:
        """Whole content; FileNotFoundError where it is absent."""
        return self.fs.cat_file(self.path(relative))

    def names(self, folder: str) -> list[str]:
        """Base names of what lies directly in ``folder``, sorted; empty where it does not exist."""
        self.fs.invalidate_cache(self.path(folder))
        if not self.fs.exists(self.path(folder)):
            return []
        entries = self.fs.ls(self.path(folder), detail=False)
        return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)

    def files(self, folder: str) -> list[str]:
        """Every file below ``folder``, by its path relative to the cache, sorted; empty where it does not exist."""
        self.fs.invalidate_cache()
        found = (str(path) for path in self.fs.find(self.path(folder)))
        return sorted(path[len(self.root) :].lstrip("/") for path in found)

    def remove(self, relative: str) -> None:
        """Remove a file, or a link itself; CacheError where it lies outside of the cache, in a folder that is linked into it."""
        path = self.path(relative)
        if self.local and not _is_inside(os.path.dirname(path), self.root):
            raise CacheError(f"{path} lies outside of the cache, behind a link: remove it there by hand, or the link")
        self.fs.rm_file(path)

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
            self.fs.put_file(str(source), self.path(relative))
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
            try:
                self.fs.pipe_file(self.path(relative), data, mode="create")
            except FileExistsError:
                return False
            return True
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

    def staging(self) -> Path:
        """A local folder for files under construction: beside their target where that is local, so that the move is atomic."""
        if self.local:
            folder = Path(self.root) / ".staging"
        else:
            import tempfile

            folder = Path(tempfile.gettempdir()) / "kdcli-staging"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _is_inside(folder: str, root: str) -> bool:
    real, inside = os.path.realpath(folder), os.path.realpath(root)
    return os.path.commonpath([real, inside]) == inside


def sync_folder(folder: Path) -> None:
    """Make a rename or link in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
