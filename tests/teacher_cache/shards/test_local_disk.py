"""Commits on disks that can less: no hard links, no rename that replaces nothing, no locks, no sync of folders, several disks."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.errors import KdcliError
from teacher_cache.shards import local_disk
from teacher_cache.shards.storage import Storage

NAME = "samples/commits/000000.json"


def fails(code: int) -> Callable[..., Any]:
    def call(*arguments: Any, **_: Any) -> None:
        raise OSError(code, os.strerror(code), str(arguments[0]))

    return call


LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL, errno.EACCES)


@pytest.fixture(params=["rename", "lock"])
def bare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A disk without hard links; ``lock``: nor the rename that replaces nothing."""
    monkeypatch.setattr(os, "link", fails(errno.EPERM))
    if request.param == "lock":
        monkeypatch.setattr(local_disk, "_rename_to_new", lambda draft, target: None)
    return str(request.param)


@pytest.mark.parametrize("code", LINKS, ids=errno.errorcode.get)
def test_any_way_to_have_no_links(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", fails(code))
    storage = Storage(tmp_path)
    assert storage.put_new(NAME, b"first") and not storage.put_new(NAME, b"second")
    assert storage.read(NAME) == b"first" and storage.names("samples/commits") == ["000000.json"]


def test_the_first_stands_and_no_draft_is_left(bare: str, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert storage.put_new(NAME, b"first") and not storage.put_new(NAME, b"second")
    (tmp_path / "samples/commits/000001.json").symlink_to("nowhere")
    assert not storage.put_new("samples/commits/000001.json", b"x")
    assert storage.read(NAME) == b"first" and storage.names("samples/commits") == ["000000.json", "000001.json"]


def _race(folder: Path, number: int, start: Any, won: Any) -> None:
    storage = Storage(folder)
    start.wait()
    won.put([number for shard in range(30) if storage.put_new(f"commits/{shard}", bytes([number]) * 5000)])


def test_one_of_several_processes_wins_each_name(bare: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # without links, as this process
    start, won = context.Event(), context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path, number, start, won)) for number in range(4)]
    for racer in racers:
        racer.start()
    start.set()
    wins = [won.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert sum(map(len, wins)) == 30 and len(list((tmp_path / "commits").iterdir())) == 30
    found = [file.read_bytes() for file in (tmp_path / "commits").iterdir()]
    assert all(len(one) == 5000 and len(set(one)) == 1 for one in found)
    assert sorted(one[0] for one in found) == sorted(number for each in wins for number in each)


def test_threads_too(bare: str, tmp_path: Path) -> None:
    storage, wins = Storage(tmp_path), list[bool]()
    threads = [threading.Thread(target=lambda: wins.append(storage.put_new(NAME, b"x"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == [False] * 7 + [True]


def test_a_kill_before_the_name_leaves_no_commit(bare: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft is whole and synced before it has the name: dying at any step leaves the old state or the new one."""

    class Killed(BaseException):
        pass

    def dies(*_: object) -> None:
        raise Killed

    storage = Storage(tmp_path)
    for step in ("fsync", "rename" if bare == "lock" else "link"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, dies)
            with pytest.raises(Killed):
                storage.put_new(NAME, b"whole")
        assert not storage.exists(NAME)
    assert storage.put_new(NAME, b"whole") and storage.read(NAME) == b"whole"


def test_a_disk_that_can_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", fails(errno.EPERM))
    monkeypatch.setattr(local_disk, "_rename_to_new", lambda draft, target: None)
    monkeypatch.setattr("fcntl.flock", fails(errno.ENOLCK))
    with pytest.raises(KdcliError, match=rf"{tmp_path}/samples/commits: .*locked .*hard links .*another disk"):
        Storage(tmp_path).put_new(NAME, b"x")
    assert not Storage(tmp_path).exists(NAME) and Storage(tmp_path).names("samples/commits") == []


def test_a_link_whose_answer_was_lost_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def asked_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", asked_twice)
    storage = Storage(tmp_path)
    assert storage.put_new(NAME, b"mine") and storage.read(NAME) == b"mine"
    assert not storage.put_new(NAME, b"yours") and storage.read(NAME) == b"mine"


def test_a_real_error_is_no_missing_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        Storage(tmp_path).put_new(NAME, b"x")


def test_a_folder_linked_to_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, refused = os.replace, []

    def across(source: Path, target: Path) -> None:
        if ".staging" in str(source):
            refused.append(target)
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", across)
    storage = Storage(tmp_path)
    storage.put_bytes(b"tar", "samples/data/x.tar")
    assert refused and storage.read("samples/data/x.tar") == b"tar"
    assert storage.names("samples/data") == ["x.tar"] and storage.names(".staging") == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF], ids=errno.errorcode.get)
def test_a_disk_whose_folders_cannot_be_synced(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def on_files(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(code, os.strerror(code))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", on_files)
    storage = Storage(tmp_path / "a" / "b")
    storage.put_bytes(b"x", "samples/data/x.tar")
    assert storage.put_new(NAME, b"x")
    monkeypatch.setattr(os, "fsync", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        storage.put_bytes(b"y", "samples/data/y.tar")


def test_what_holds_a_commit_is_on_the_disk_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder that is new, and every file, before the commit has its name; the name itself before its writer goes on."""
    synced, linked = list[str](), list[int]()
    fsync, link = os.fsync, os.link

    def noted(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def named(source: Path, target: Path) -> None:
        linked.append(len(synced))
        link(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "link", named)
    root = tmp_path / "new" / "cache"
    storage = Storage(root)
    storage.put_bytes(b"x", "fields/relation/data/x.tar")
    assert storage.put_new("fields/relation/commits/000000.json", b"x")
    before = synced[: linked[0]]
    folders = [
        "",
        "/new",
        "/new/cache",
        "/new/cache/fields",
        "/new/cache/fields/relation",
        "/new/cache/fields/relation/data",
    ]
    assert {f"{tmp_path}{folder}" for folder in folders} <= set(before)
    assert synced[-1] == f"{root}/fields/relation/commits"
    second = Storage(root)  # another process that finds the folders there does not know that they are safe
    synced.clear()
    assert second.put_new("fields/relation/commits/000001.json", b"x")
    assert {f"{tmp_path}/new", f"{root}", f"{root}/fields", f"{root}/fields/relation"} <= set(synced)
