"""Every file of a job has the permissions that the umask gives: colleagues read caches, models and exported folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.demo_training.model import STUDENT, build_model
from benchmarks.demo_training.model import export as export_demo
from benchmarks.demo_training.tokenizer import load_tokenizer
from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.export.run import ExportRequest, export
from pipelines.settings import Settings
from pipelines.train.stage_trainer import MAPS, save_maps
from pipelines.train.train_student import train
from student_train.config import TrainSettings


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o026)  # a group that reads and does not write, as no default has it
    yield 0o026
    os.umask(before)


def test_what_a_job_writes(
    umask: int, make_request: Callable[..., CaptureRequest], tiny_student: Path, tmp_path: Path
) -> None:
    out = tmp_path / "job"
    capture(make_request(out / "cache", fields=(), store="standard", shards=2, data=None))
    settings = TrainSettings(student=str(tiny_student), output_dir=str(out / "run"), max_steps=2, save_steps=1)
    train(str(out / "cache"), "llava-kd", Settings(train=settings), "DPT")
    save_maps(out / "run" / MAPS, {"w": torch.ones(2)}, out / "none")
    export(ExportRequest(out / "run", out / "exported"))
    export_demo(build_model(STUDENT, load_tokenizer(), 0), out / "demo")
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"model.safetensors", "manifest.json", MAPS} <= {path.name for path in files}
    assert not [(path, oct(mode)) for path in files if (mode := path.stat().st_mode & 0o777) != 0o666 & ~umask]
    folders = [path for path in out.rglob("*") if path.is_dir()]
    assert not [(path, oct(mode)) for path in folders if (mode := path.stat().st_mode & 0o777) != 0o777 & ~umask]
