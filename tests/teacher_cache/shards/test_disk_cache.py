"""Tars on a local disk: fetched once by whoever comes first, never other bytes than committed, within the bound, shared, kill-safe."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import fsspec
import pytest

from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.shards.commit import Commit, parse_commit
from teacher_cache.shards.disk_cache import DiskCache
from teacher_cache.shards.storage import Storage

SIZE = 1000


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Storage]:
    """In memory, with ``fetched``: every tar that was asked for."""
    storage = Storage(f"memory://{request.node.name}")
    storage.fetched = []  # type: ignore[attr-defined]
    download = Storage.download

    def counted(self: Storage, relative: str, target: Path) -> None:
        storage.fetched.append(relative)  # type: ignore[attr-defined]
        download(self, relative, target)

    monkeypatch.setattr(Storage, "download", counted)
    yield storage
    fsspec.filesystem("memory").store.clear()


def put(storage: Storage, shard: int, content: bytes | None = None) -> Commit:
    """A tar of ``SIZE`` bytes that are its shard's number, or other content, and the commit that names it."""
    promised = bytes([shard]) * SIZE
    commit = Commit(shard, "", "", f"{shard}.tar", SIZE, hashlib.sha256(promised).hexdigest(), "", "", 0, 0, (), {})
    storage.fs.pipe_file(storage.path(f"samples/data/{commit.tar}"), promised if content is None else content)
    return commit


def read(cache: DiskCache, storage: Storage, commit: Commit) -> bytes:
    opened = cache.open(storage, "samples", commit)
    assert opened is not None
    with closing(opened):
        return opened.read()


def taken(folder: Path) -> int:
    return sum(one.stat().st_size for one in folder.iterdir())


def test_the_longest_unused_goes_and_the_bound_holds(storage: Storage, tmp_path: Path) -> None:
    cache, commits = DiskCache(tmp_path, 3 * SIZE), [put(storage, shard) for shard in range(5)]
    for shard in (0, 1, 2, 0, 3, 0, 4, 0):
        assert read(cache, storage, commits[shard]) == bytes([shard]) * SIZE
        assert taken(tmp_path) <= 3 * SIZE
        time.sleep(0.002)  # use is told apart by the file's time
    assert storage.fetched == [f"samples/data/{shard}.tar" for shard in (0, 1, 2, 3, 4)]  # type: ignore[attr-defined]
    read(cache, storage, commits[1])
    assert len(storage.fetched) == 6  # type: ignore[attr-defined]


def test_what_is_open_is_not_evicted(storage: Storage, tmp_path: Path) -> None:
    cache, commits = DiskCache(tmp_path, 2 * SIZE), [put(storage, shard) for shard in range(3)]
    first, second = (cache.open(storage, "samples", commit) for commit in commits[:2])
    assert first and second
    assert cache.open(storage, "samples", commits[2]) is None  # the caller asks the store
    first.close()
    assert read(cache, storage, commits[2]) == bytes([2]) * SIZE
    assert second.read() == bytes([1]) * SIZE and taken(tmp_path) == 2 * SIZE


def test_wrong_bytes_are_fetched_once_more_and_never_handed_out(storage: Storage, tmp_path: Path) -> None:
    cache, commit = DiskCache(tmp_path, 9 * SIZE), put(storage, 7, b"x" * SIZE)
    with pytest.raises(CacheError, match="fetched twice, and its bytes do not have the checksum"):
        cache.open(storage, "samples", commit)
    assert len(storage.fetched) == 2 and taken(tmp_path) == 0  # type: ignore[attr-defined]
    storage.remove("samples/data/7.tar")
    with pytest.raises(CacheError, match="is missing"):
        cache.open(storage, "samples", commit)
    put(storage, 7)
    read(cache, storage, commit)
    next(tmp_path.glob("*.tar")).write_bytes(b"short")
    assert read(cache, storage, commit) == bytes([7]) * SIZE


def test_what_a_killed_process_left_is_nobodys(storage: Storage, tmp_path: Path) -> None:
    cache, commits = DiskCache(tmp_path, SIZE), [put(storage, shard) for shard in range(2)]
    left = [tmp_path / f"{commit.tar_sha256}.{SIZE}.part" for commit in commits]
    for part in left:
        part.write_bytes(b"half")
        part.with_suffix(".lock").touch()
    assert read(cache, storage, commits[0]) == bytes([0]) * SIZE
    assert not any(part.exists() for part in left)


def _read_all(
    folder: Path, storage: Storage, commits: list[Commit], order: list[int], found: multiprocessing.Queue
) -> None:
    cache = DiskCache(folder, 3 * SIZE)
    found.put(all(read(cache, storage, commits[shard]) == bytes([shard]) * SIZE for shard in order))


def test_processes_share_it(storage: Storage, tmp_path: Path) -> None:
    commits = [put(storage, shard) for shard in range(6)]
    context = multiprocessing.get_context("fork")  # they inherit the store in memory
    found = context.Queue()
    orders = [[(step * stride + start) % 6 for step in range(60)] for stride, start in ((1, 0), (1, 3), (5, 1))]
    arguments = [(tmp_path, storage, commits, order, found) for order in orders]
    readers = [context.Process(target=_read_all, args=one) for one in arguments]
    for reader in readers:
        reader.start()
    assert [found.get(timeout=60) for _ in readers] == [True] * 3
    for reader in readers:
        reader.join()
    assert taken(tmp_path) <= 3 * SIZE and not list(tmp_path.glob("*.part"))


def test_a_tar_takes_its_name_while_nobody_counts(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who counts between two looks at the folder would meet it under neither name, and let in one too many."""
    replace, seen = os.replace, []

    def named(part: Path, path: Path) -> None:
        with (tmp_path / "evicting").open("ab") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(path)
        replace(part, path)

    monkeypatch.setattr(os, "replace", named)
    read(DiskCache(tmp_path, SIZE), storage, put(storage, 0))
    assert len(seen) == 1


def test_fetching_ahead_takes_only_free_room(storage: Storage, tmp_path: Path) -> None:
    cache, commits = DiskCache(tmp_path, 3 * SIZE), [put(storage, shard) for shard in range(5)]
    read(cache, storage, commits[4])
    cache.prefetch(storage, [("samples", commit) for commit in commits[:4]])
    for fetcher in cache._fetchers:
        fetcher.join(timeout=20)
    assert len(list(tmp_path.glob("*.tar"))) == 3
    assert {one.name for one in tmp_path.glob("*.tar")} <= {f"{commit.tar_sha256}.tar" for commit in commits[:4]}
    assert taken(tmp_path) == 3 * SIZE


def test_a_folder_with_other_files_keeps_them(storage: Storage, tmp_path: Path) -> None:
    """Neither counted nor evicted, whatever they are called."""
    names = ["thesis.tar", f"{'a' * 63}.tar", "notes.part", "x.12.part", "paper.lock", f"{'b' * 64}.tar.bak"]
    for name in names:
        (tmp_path / name).write_bytes(bytes(2 * SIZE))
    cache = DiskCache(tmp_path, SIZE)
    for shard in range(3):
        assert read(cache, storage, put(storage, shard)) == bytes([shard]) * SIZE
    assert all((tmp_path / name).read_bytes() == bytes(2 * SIZE) for name in names)


def test_links_in_the_folder_are_neither_read_nor_followed(storage: Storage, tmp_path: Path) -> None:
    victim, kept, commit = tmp_path / "victim", tmp_path / "kept", put(storage, 3)
    victim.write_bytes(bytes([9]) * SIZE)
    cache = DiskCache(kept, 2 * SIZE)
    tar = kept / f"{commit.tar_sha256}.tar"
    tar.symlink_to(victim)
    (kept / f"{'c' * 64}.tar").symlink_to(victim)
    os.mkfifo(kept / f"{'d' * 64}.tar")
    (kept / f"{'e' * 64}.5.lock").symlink_to(victim)
    assert read(cache, storage, commit) == bytes([3]) * SIZE and not tar.is_symlink()
    for shard in range(3):
        read(cache, storage, put(storage, shard))
    assert victim.read_bytes() == bytes([9]) * SIZE


@pytest.mark.parametrize(("mode", "reason"), [(0o777, "others"), (0o1777, "others"), (0o770, "others")])
def test_a_folder_that_others_write_to_is_refused(tmp_path: Path, mode: int, reason: str) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(CacheError, match=rf"{folder} .*{reason}.*--local-cache"):
        DiskCache(folder, SIZE)


def test_a_folder_of_another_user_is_refused_and_a_link_of_ones_own_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert DiskCache(tmp_path / "link" / "kept", SIZE).folder.stat().st_mode & 0o777 == 0o700
    DiskCache(tmp_path / "link", SIZE)
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.raises(CacheError, match="belongs to another user"):
        DiskCache(tmp_path, SIZE)


def test_a_hash_that_is_a_path_is_no_commit() -> None:
    commit = Commit(0, "", "", "0.tar", SIZE, "../../home", "0.parquet", "0" * 64, 0, 0, (), {})
    with pytest.raises(CacheError, match="not a sha256"):
        parse_commit(commit.to_bytes(), "here")


def test_a_disk_without_locks_is_said(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(KdcliError, match=r"cannot be locked .*No locks available.*--local-cache"):
        read(DiskCache(tmp_path, SIZE), storage, put(storage, 0))
