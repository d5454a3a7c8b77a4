"""Families whose processors need torchvision: it lies in a folder of its own (`make install`), so that all other tests run without it.

The packaged torchvision is built for CUDA. Beside the CPU build of torch two of its operators must be known by name before it is
imported; nothing here calls them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FOUND = importlib.util.find_spec("torchvision") is not None

if FOUND:
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist
        _library = torch.library.Library("torchvision", "DEF")
        for _operator in ("nms", "qnms"):
            _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not FOUND:
        reason = "no torchvision: run these tests by `make test`, or with PYTHONPATH=.venv/torchvision"
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def rows_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``chat.json``, ``captions.json`` and their images (rows.py)."""
    from tests.families.rows import write_rows

    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``folder_of(family, **build_folder settings)`` → a model folder, made once for the same settings."""
    from tests.families.models import FAMILIES, build_folder

    made: dict[Any, Path] = {}

    def make(name: str, **settings: Any) -> Path:
        wanted = (name, *sorted(settings.items()))
        if wanted not in made:
            made[wanted] = build_folder(FAMILIES[name], tmp_path_factory.mktemp("models") / name, **settings)
        return made[wanted]

    return make


@pytest.fixture(scope="session")
def captured(
    make_request: Callable[..., Any], rows_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``captured(teacher folder)`` → a complete cache of the rows with exact hidden states."""
    from pipelines.capture.cache_teacher import capture
    from tests.families.rows import mixture

    def make(teacher: Path) -> Path:
        out = tmp_path_factory.mktemp("caches") / "cache"
        fields = ("response_hidden", "vision_hidden", "affinity")
        capture(make_request(out, data=mixture(rows_folder), teacher=teacher, fields=fields, shards=2))
        return out

    return make


@pytest.fixture
def open_step(tmp_path: Path) -> Callable[..., tuple[Any, Any]]:
    """``open_step(cache, student, method, **train settings)`` → (trainer, the one micro-batch of a step over all rows)."""
    from pipelines.settings import Settings
    from pipelines.train.stage_plans import plan_stages
    from pipelines.train.stage_trainer import make_trainer
    from pipelines.train.train_student import settle
    from student_train import distributed
    from student_train.config import StageSettings, TrainSettings
    from student_train.load_student import load_student
    from teacher_cache.reading.cache import TeacherCache
    from teacher_cache.reading.cached_samples import CachedSamples

    def open_(cache_url: Path, student: Path, method: str, **changes: Any) -> tuple[Any, Any]:
        cache = TeacherCache(str(cache_url))
        rows = sum(CachedSamples(cache, ("caption", "sft"), ()).counts)
        given = {"per_device_train_batch_size": rows, "max_steps": 1, "report_to": "none", "max_grad_norm": 0.0}
        train = TrainSettings(student=str(student), **{**given, **changes})
        stages = {"DFT": StageSettings(parts=("caption", "sft"))}
        (plan,), _ = settle(
            cache,
            plan_stages(cache, method, Settings(train=train, stages=stages), "DFT", "paper", None),
            str(student),
        )
        torch.manual_seed(0)
        model, processor = load_student(str(student), "sdpa", compressor=plan.compressor)
        reader = CachedSamples(cache, plan.parts, plan.served.names)
        processes = distributed.Processes(0, 1, torch.device("cpu"))
        folder = tmp_path / f"step-{len(list(tmp_path.iterdir()))}"
        trainer, batches_from = make_trainer(cache, plan, reader, model, processor, rows, rows, processes, folder)
        (one,) = next(iter(batches_from(0)))[1]
        return trainer, one

    return open_
