"""One folder behind an fsspec URL, with the two writes a cache needs: whole files, and put-if-absent."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from teacher_cache.errors import CacheError, without_secrets
from teacher_cache.shards import plain_files, staging
from teacher_cache.shards.local_disk import give_name, is_inside, make_folder, move, sync_file, sync_folder
from teacher_cache.shards.places import place_of
from teacher_cache.shards.plain_files import AT_ONCE, most_bytes, refuse_long
from teacher_cache.shards.remote import READ_ONLY, all_persistently, at_most, exactly, persistently

T = TypeVar("T")


class Storage:
    """Reads and writes below ``url`` (a local path, ``s3://…``, ``gs://…``, ``https://…``). Paths given to it are relative, with ``/``.

    A request to a store is tried again while that may help; then it is a CacheError of one line. FileNotFoundError means: not there.
    """

    def __init__(self, url: str | Path):
        place = place_of(url)
        self.url, self.scheme, self.local = place.text, place.scheme, place.local
        if self.scheme in READ_ONLY and "?" in self.url:
            raise CacheError(f"{self.url}: a cache is a folder of a web server: name it without ?")
        self.fs, self.root = place.open()
        self.root = self.root.rstrip("/") or "/"
        self._process = os.getpid()
        self._synced: set[Path] = set()
        if hasattr(self.fs, "retries"):
            self.fs.retries = 2  # s3fs's own, around botocore's and within ours

    def path(self, relative: str) -> str:
        """Where a relative path lies; CacheError where it leaves the cache: documents name files, and anybody can write one."""
        parts = relative.split("/")
        if relative.startswith("/") or ".." in parts or max(map(len, parts)) > 250 or set(relative) & {"\\", "\0"}:
            raise CacheError(
                f"{self}: {relative[:80]!r} is not a file of a cache: the document that names it is damaged or hostile"
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
        """Whether anything stands there, also what cannot be read."""
        if self.local:
            return plain_files.is_there(self.path(relative))
        try:
            self._ask(relative, lambda fs: fs.info(self.path(relative)))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def size(self, relative: str) -> int:
        """Bytes; FileNotFoundError where it is absent, CacheError where it is not a regular file."""
        if self.local:
            return plain_files.regular_size(self.path(relative))
        return int(self._ask(relative, lambda fs: fs.size(self.path(relative))))

    def sizes(self, folder: str, wanted: Iterable[str] = ()) -> dict[str, int]:
        """Base name → bytes of the files directly in ``folder``; empty where it does not exist. Of a store one listing.

        Args:
            wanted: names that are asked for one by one where the listing does not show them: those of some stores lag.
        """
        found = dict(self._listed_sizes(folder))
        for name in sorted(set(wanted) - set(found)):
            with suppress(FileNotFoundError, NotADirectoryError, CacheError):
                found[name] = self.size(f"{folder}/{name}")
        return found

    def _listed_sizes(self, folder: str) -> Iterator[tuple[str, int]]:
        if self.local:
            for name in self.names(folder):
                with suppress(FileNotFoundError, NotADirectoryError, CacheError):
                    yield name, self.size(f"{folder}/{name}")
            return
        self.fs.invalidate_cache(self.path(folder))
        with suppress(FileNotFoundError, NotADirectoryError):
            for one in self._ask(folder, lambda fs: fs.ls(self.path(folder), detail=True)):
                yield str(one["name"]).rstrip("/").rsplit("/", 1)[-1], int(one["size"] or 0)

    def modified(self, relative: str) -> float | None:
        """When a file was written, in seconds since 1970 by the storage's own clock; None where it is absent, or nobody tells."""
        self.fs.invalidate_cache(self.path(relative))
        try:
            return self._ask(relative, lambda fs: fs.modified(self.path(relative)).timestamp())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, relative: str) -> BinaryIO:
        """A file of a local cache to seek in; CacheError where it is not a regular file."""
        return plain_files.open_plain(self.path(relative))

    def read(self, relative: str) -> bytes:
        """Whole content; FileNotFoundError where it is absent, CacheError where it is not a regular file, or too long."""
        return next(self.read_each([relative]))

    def read_each(self, relatives: Sequence[str]) -> Iterator[bytes]:
        """``read`` of several files of one kind, one after the other; of a store as many at once as memory takes for certain."""
        most = max(map(most_bytes, relatives), default=0)
        if self.local:
            yield from (plain_files.read_plain(self.path(relative), most) for relative in relatives)
            return
        step = max(1, AT_ONCE // most) if relatives else 1
        for names in (relatives[start : start + step] for start in range(0, len(relatives), step)):
            for name, data in zip(names, self._ask_all(names, partial(at_most, most=most))):
                refuse_long(f"{self.url}/{name}", len(data), most)
                yield data

    def head(self, relative: str, count: int) -> bytes:
        """The first ``count`` bytes of a file, or all of a shorter one; raises what ``read`` does."""
        if self.local:
            with self.open(relative) as opened:
                return opened.read(count)
        return self._ask(relative, lambda fs: fs.cat_file(self.path(relative), start=0, end=count))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Bytes start … stop − 1 of each (file, start, stop), all requested at once; never fewer or others."""

        def call(fs: Any, paths: list[str], numbers: list[int]) -> list[Any]:
            _, starts, stops = zip(*(ranges[number] for number in numbers))
            found = fs.cat_ranges(paths, list(starts), list(stops), on_error="return")
            return [exactly(one, stop - start) for one, start, stop in zip(found, starts, stops)]

        return self._ask_all([name for name, _, _ in ranges], call)

    def _ask_all(self, relatives: Sequence[str], call: Callable[[Any, list[str], list[int]], list[Any]]) -> list[Any]:
        """``call(file system, paths, their numbers in relatives)``, again for those alone that failed; its answers in order."""

        def ask(numbers: list[int]) -> list[Any]:
            return call(self.fs, [self.path(relatives[number]) for number in numbers], numbers)

        if self._process != os.getpid():
            self.__init__(self.url)  # type: ignore[misc]  # connections do not survive a fork
        return all_persistently([f"{self.url}/{relative}" for relative in relatives], ask)

    def download(self, relative: str, target: Path) -> None:
        """The whole file as a local one, as the store sends it; its reader checks it."""
        self._ask(relative, lambda fs: fs.get_file(self.path(relative), str(target)))

    @contextmanager
    def local_copy(self, relative: str) -> Iterator[Path]:
        """The file on a local disk: itself, or a copy that is removed afterwards."""
        if self.local:
            self.size(relative)  # there, and a regular file
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
        """Base names of what lies directly in ``folder``, sorted; empty where it does not exist.

        CacheError where something else has its name, or a link to nothing: what lies on a disk that is not mounted is not gone.
        """
        if self.local and os.path.lexists(path := self.path(folder)) and not os.path.isdir(path):
            what = "a link to nothing (is its disk mounted?)" if os.path.islink(path) else "no folder"
            raise CacheError(f"{path}: {what}: put the folder back that was here")
        self.fs.invalidate_cache(self.path(folder))
        try:
            entries = self._ask(folder, lambda fs: fs.ls(self.path(folder), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CacheError(f"{self.path(folder)}: {error.strerror}: put the folder back that was here") from None
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
        if self.local and not is_inside(os.path.dirname(path), self.root):
            raise CacheError(f"{path} is outside the cache, behind a link: remove it there by hand, or remove the link")
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
            self._make_folder(target.parent, durable)
            if durable:
                sync_file(source)
            move(source, target)
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
        self._make_folder(target.parent)
        draft = target.parent / f".{target.name}.{uuid.uuid4().hex}"
        try:
            with draft.open("wb") as written:
                written.write(data)
                written.flush()
                os.fsync(written.fileno())
            if not give_name(draft, target):
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
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        return folder

    def _make_folder(self, folder: Path, durable: bool = True) -> None:
        """A folder of the cache, that survives a power cut with all above it: another process may have made it a moment ago."""
        if not durable:
            folder.mkdir(parents=True, exist_ok=True)
            return
        make_folder(folder)
        if folder not in self._synced:
            root = Path(self.root)
            for one in (root.parent, *reversed([one for one in folder.parents if one.is_relative_to(root)])):
                with suppress(PermissionError):  # what stands above a cache need not be readable
                    sync_folder(one)
            self._synced.add(folder)
