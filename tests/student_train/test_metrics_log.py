"""What a step says of its rows and its time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.distributed import Processes
from student_train.metrics_log import MetricsLog, StepResult
from teacher_cache.errors import KdcliError


def test_a_step_counts_what_both_sides_read(
    open_stage: Callable[..., Any], tiny_cache: Path, coarse_student: Path, tmp_path: Path
) -> None:
    """Rows with and without an image, nine vision tokens an image for the student where the teacher has 36."""
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "max_steps": 2, "packing": False}
    trainer, batches_from = open_stage(tiny_cache, "SFT", parts=("sft",), method="sft", student=coarse_student, **sizes)
    batches = next(iter(batches_from(0)))[1]
    trainer.train(batches_from)
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    first = lines[0]
    with_images = sum(bool(count) for one in batches for count in one.batch.counts["vision"])
    assert first["samples"] == 9 and 0 < with_images <= first["images"]
    assert first["vision_tokens"] == sum(sum(one.batch.counts["vision"]) for one in batches) == 9 * first["images"]
    assert first["cached_vision_tokens"] == 36 * first["images"]
    assert first["tokens"] == sum(int(one.batch.inputs["attention_mask"].sum()) for one in batches)
    assert all(one["seconds"] > 0 and one["data_seconds"] >= 0 for one in lines)
    assert "peak_memory_bytes" not in first, "nobody counts the bytes of a CPU"


def a_log(folder: Path, first_step: int) -> MetricsLog:
    return MetricsLog(folder, first_step, 1, Processes(0, 1, torch.device("cpu")), lambda step: ())


def test_what_a_kill_or_a_bad_disk_left_is_dropped_byte_by_byte(tmp_path: Path) -> None:
    """A line that is no UTF-8, one that is cut, one of a step that is made again; the others stay as they are."""
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"step": 0}\n\xff\xfe\n{"step": 1}\n{"step": 2}\n{"st')
    a_log(tmp_path, 2).close()
    assert log.read_bytes() == b'{"step": 0}\n{"step": 1}\n' and [one.name for one in tmp_path.iterdir()] == [log.name]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_something_else_in_its_place_is_one_line(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(KdcliError, match=r"metrics\.jsonl is not a file"):
        a_log(tmp_path, 0)


def test_a_full_disk_names_the_log(tmp_path: Path) -> None:
    log = a_log(tmp_path, 0)
    assert log.file
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), log.file.fileno())
    for act in (lambda: log.write(0, StepResult(1.0, {}, 1.0, 1.0, 1)), log.close):
        with pytest.raises(KdcliError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
            act()
