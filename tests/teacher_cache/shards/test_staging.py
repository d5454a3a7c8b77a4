"""Local disk under tars that wait for their upload: bounded, swept of the dead, and one line when it is full."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.records import SkipRecord
from teacher_cache.shards import staging
from teacher_cache.shards.index import Entry
from teacher_cache.shards.storage import Storage
from teacher_cache.shards.writer import ShardWriter


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine's temporary folder, as ``TMPDIR`` would name it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(staging, "_own", None)
    return tmp_path


@pytest.fixture
def make_writer(temporary: Path) -> Callable[..., ShardWriter]:
    return lambda shard, bound=0: ShardWriter(
        Storage(f"memory://staging-{temporary.name}"), "samples", shard, "p", "", bound
    )


def test_the_bound_is_said_with_the_folder_and_leaves_nothing(
    make_writer: Callable[..., ShardWriter], temporary: Path
) -> None:
    writer = make_writer(0, 100_000)
    for number in range(20):
        writer.copy(Entry(f"{number}", number, 0, 0, 0), {"bin": bytes(10_000)})
    with pytest.raises(CacheError, match=rf"{temporary}/kdcli-staging.*--staging-gb.*more --shards"):
        writer.commit()
    writer.abandon()
    assert not writer.storage.files("") and not list(temporary.rglob("*.tar"))
    with pytest.raises(CacheError, match=r"GB are free.*TMPDIR"):
        make_writer(1, 1 << 60)


def test_folders_of_the_dead_go_those_of_the_living_stay(temporary: Path) -> None:
    hold = "import sys; from teacher_cache.shards import staging; print(staging.own_folder(), flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        half = theirs / f"samples-000000-{uuid.uuid4().hex}.tar"
        half.write_bytes(b"half")
        ours = staging.own_folder()
        assert theirs.parent == ours.parent and half.exists()
        other.kill()
        other.wait()
    finally:
        other.kill()
    staging._own = None  # as the next process begins
    assert staging.own_folder() != ours and not theirs.exists()


def test_a_full_disk_is_one_line_and_commits_nothing(
    make_writer: Callable[..., ShardWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Known:
        hex = "known"

    monkeypatch.setattr("uuid.uuid4", lambda: Known)
    folder = staging.own_folder()
    (folder / "samples-000000-known.tar").symlink_to("/dev/full")  # a disk without room
    writer = make_writer(0)
    writer.skip(SkipRecord("sft", 0, "", "", "bad_row", ""))
    with pytest.raises(CacheError, match=rf"{folder}: No space left.*TMPDIR"):
        writer.copy(Entry("1", 1, 0, 0, 0), {"bin": bytes(1 << 20)})
    writer.abandon()
    assert not writer.storage.files("")


def dead(folder: Path, name: str = "4194305-00000000") -> Path:
    """What a process that was killed left: its folder with a lock that nobody holds, and a half-written tar."""
    left = folder / name
    left.mkdir(parents=True, exist_ok=True)
    (left / staging.LOCK).touch()
    (left / f"samples-000000-{'0' * 32}.tar").write_bytes(b"half")
    return left


def folder_of_mode(base: Path, mode: int) -> None:
    base.mkdir()
    base.chmod(mode)


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link": (lambda base: base.symlink_to(base.parent / "victim"), "is a link"),
    "a file": (lambda base: base.write_text("x"), "is no folder"),
    "a pipe": (lambda base: os.mkfifo(base), "is no folder"),
    "a dead link": (lambda base: base.symlink_to("nowhere"), "is a link"),
    "written to by all": (lambda base: folder_of_mode(base, 0o777), "can be written to by others"),
    "written to by its group": (lambda base: folder_of_mode(base, 0o770), "can be written to by others"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_that_others_could_have_made_is_refused(temporary: Path, kind: str) -> None:
    victim = dead(temporary / "victim")
    make, reason = FOREIGN[kind]
    make(staging.base())
    with pytest.raises(CacheError, match=rf"kdcli-staging-.*{reason}.*TMPDIR"):
        staging.own_folder()
    assert len(list(victim.iterdir())) == 2


def test_a_folder_of_another_user_is_refused(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging.own_folder()
    name, owner = staging.base().name, os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    (temporary / name).rename(staging.base())
    with pytest.raises(CacheError, match="belongs to another user"):
        staging._own = None
        staging.own_folder()


def test_only_files_of_own_names_go_and_links_are_not_followed(temporary: Path) -> None:
    victim = dead(temporary / "victim")
    (temporary / "victim" / "precious").write_text("x")
    staging.base().mkdir(mode=0o700)
    (staging.base() / "4194306-00000000").symlink_to(victim)
    (staging.base() / "4194307-00000000").symlink_to(temporary / "victim")
    swept, kept, foreign = (dead(staging.base(), f"41943{number}-00000000") for number in (10, 11, 12))
    (swept / f"{'1' * 32}-x.json").symlink_to(temporary / "victim" / "precious")
    (kept / "thesis.tar").write_text("x")
    (kept / "folder").symlink_to(temporary / "victim")
    (kept / "inner").mkdir()
    (kept / "inner" / f"samples-000000-{'0' * 32}.tar").write_text("x")
    foreign.rename(foreign.with_name("notes-2024"))
    pipe = dead(staging.base(), "4194320-00000000")
    (pipe / staging.LOCK).unlink()
    os.mkfifo(pipe / staging.LOCK)
    staging.own_folder()
    assert len(list(victim.iterdir())) == 2 and (temporary / "victim" / "precious").read_text() == "x"
    assert not swept.exists() and len(list(foreign.with_name("notes-2024").iterdir())) == 2 and pipe.exists()
    assert sorted(one.name for one in kept.iterdir()) == ["folder", "inner", "thesis.tar"]
    assert len(list((kept / "inner").iterdir())) == 1
    assert stat.S_IMODE(staging.base().stat().st_mode) == stat.S_IMODE(staging.own_folder().stat().st_mode) == 0o700


def test_a_disk_without_locks_is_said(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(KdcliError, match=rf"{temporary}/.*cannot be locked .*No locks available.*TMPDIR"):
        staging.own_folder()


def test_a_temporary_folder_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python takes ``/tmp`` then, and the disk that was chosen for its room stays empty."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    with pytest.raises(CacheError, match=r"TMPDIR names '.*/scratch', which is not a folder: create it"):
        staging.base()
