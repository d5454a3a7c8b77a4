"""Local disk under tars that wait for their upload: bounded, swept of the dead, and one line when it is full."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from teacher_cache.errors import CacheError
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
        (theirs / "half.tar").write_bytes(b"half")
        ours = staging.own_folder()
        assert theirs.parent == ours.parent and (theirs / "half.tar").exists()
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
