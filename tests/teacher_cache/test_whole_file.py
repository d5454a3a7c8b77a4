"""A file is written whole or not at all, on disks that are really full, and nothing of a draft stays."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.errors import KdcliError
from teacher_cache.whole_file import _draft, refuse_unwritable, write_whole

BIG = b"x" * 100_000


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def test_new_content_stands_there_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "new" / "a.txt", "größer")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "größer".encode()
    write_whole(tmp_path / "new" / "a.txt", "half \ud800")
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"half \\ud800"
    assert names(tmp_path / "new") == ["a.txt"]


@pytest.mark.parametrize("before", [None, b"before"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    tmp_path: Path, small_files: Callable[[int], Any], before: bytes | None
) -> None:
    path = tmp_path / "scores.json"
    if before:
        path.write_bytes(before)
    said = r"scores\.json: cannot be written \(File too large\): .*make room"
    with pytest.raises(KdcliError, match=said) as caught, small_files(4096):
        write_whole(path, BIG)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == (["scores.json"] if before else [])
    assert not before or path.read_bytes() == before


def test_permissions_and_links_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to("real")
    write_whole(link, "new")
    assert link.is_symlink() and real.read_text() == "new" and stat.S_IMODE(real.stat().st_mode) == 0o640
    dangling = tmp_path / "dangling"
    dangling.symlink_to("absent")
    write_whole(dangling, "new")
    assert dangling.is_symlink() and (tmp_path / "absent").read_text() == "new"


def test_a_device_or_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    refuse_unwritable(pipe)
    write_whole(pipe, "said")
    assert os.read(reader, 10) == b"said" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)
    with pytest.raises(KdcliError, match="pipe: cannot be written"):
        write_whole(pipe, "nobody listens")
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    write_whole(link, "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(KdcliError, match=r"No space left on device.*make room"):
        write_whole(full, "x")


PLACES: dict[str, Callable[[Path], Path]] = {
    "a folder": lambda folder: folder,
    "below a file": lambda folder: folder / "file" / "a.json",
    "a name that is too long": lambda folder: folder / ("n" * 300),
    "a device that takes nothing": lambda folder: Path("/proc/kdcli/a.json"),
    "a link to itself": lambda folder: folder / "loop",
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_place_that_is_none_is_one_line_before_and_after_the_work(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    path = PLACES[kind](tmp_path)
    for act in (refuse_unwritable, lambda one: write_whole(one, "x")):
        with pytest.raises(KdcliError, match="cannot be written") as caught:
            act(path)
        assert str(path) in str(caught.value)
    assert names(tmp_path) == ["file", "loop"]


def test_looking_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("before")
    refuse_unwritable(tmp_path / "a.json")
    refuse_unwritable(tmp_path / "b.json")
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "before"


def test_the_draft_of_a_killed_writer_goes_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from teacher_cache.whole_file import _draft; "
        "_draft(Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.json")], check=False)
    assert killed.returncode == -signal.SIGKILL and len(names(tmp_path)) == 1
    handle, living = _draft(tmp_path / "a.json")
    write_whole(tmp_path / "a.json", "x")
    assert names(tmp_path) == sorted([living.name, "a.json"])
    os.close(handle)
    write_whole(tmp_path / "a.json", "y")
    assert names(tmp_path) == ["a.json"]
