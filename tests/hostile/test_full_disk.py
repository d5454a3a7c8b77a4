"""A disk without room is told in one line, whoever meets it; whole jobs that run into it are counted by ``benchmarks.faults``."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from student_train.checkpoint import Checkpoints, checkpoints
from student_train.distributed import Processes
from teacher_cache.errors import CacheError, KdcliError, naming_full_disk
from teacher_cache.shards.storage import Storage
from teacher_cache.shards.writer import ShardWriter

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="the system has no device that is always full")


def test_a_checkpoint_that_finds_no_room(tmp_path: Path) -> None:
    """torch's error of a failed write is no Exception; the checkpoint before it stays the newest."""
    model = torch.nn.Linear(3, 3)
    saved = Checkpoints(
        tmp_path, model, torch.optim.SGD(model.parameters()), {}, 2, Processes(0, 1, torch.device("cpu"))
    )
    saved.save(2)
    saved.wait()
    draft = tmp_path / ".draft-0000004"
    draft.mkdir()
    for written in tmp_path.glob("step-0000002/*.safetensors"):
        (draft / written.name).symlink_to(FULL)
    saved.save(4)
    with pytest.raises(KdcliError, match=r"could not be written \(OSError: .*No space left on device\): make room"):
        saved.wait()
    assert [one.name for one in checkpoints(tmp_path)] == ["step-0000002"]


def test_a_shard_that_finds_no_room_leaves_no_draft(tmp_path: Path) -> None:
    """Closing a tar writes: an abandoned writer on a full disk is removed all the same."""
    storage = Storage(tmp_path)
    writer = ShardWriter(storage, "samples", 0, "plan", "")
    with FULL.open("wb") as full:
        os.dup2(full.fileno(), writer._file.fileno())
    writer.abandon()
    assert not list(storage.staging().iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_every_way_to_say_it_names_the_place(error: Exception) -> None:
    said = r"^s3://bucket/cache: .*: complete files are kept; make room and run the same"
    with pytest.raises(KdcliError, match=said), naming_full_disk("s3://bucket/cache"):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), CacheError("shard 3: No space left")])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, naming_full_disk("cache"):
        raise error
    assert caught.value is error
