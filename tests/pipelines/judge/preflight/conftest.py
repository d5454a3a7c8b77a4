"""One preflight of the tiny world, read-only, and the settings that it was asked with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.judge.preflight.budget import Budget
from pipelines.judge.preflight.request import PreflightRequest
from pipelines.judge.preflight.run import preflight
from pipelines.settings import CaptureSettings, Settings
from student_train.config import StageSettings, TrainSettings
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.transformers import TeacherSpec

KD_TOML = """# my job
cache = "cache"

[capture]
shards = 5            # few
store = "standard"    # of the teacher
# workers = 0

[fields.vision_hidden]
step = 0.3            # a guess

[train]
student = "student"   # the one
"""


@pytest.fixture(scope="session")
def ask(
    tiny_teacher: Path, tiny_student: Path, preflight_data: tuple[DataSpec, ...]
) -> Callable[..., PreflightRequest]:
    """``ask(out, capture={…}, train={…}, stage_parts={…}, …request settings)``: llava-kd and kd on 36 rows."""

    def make(
        out: Path, capture: Any = None, train: Any = None, stage_parts: Any = None, **asked: Any
    ) -> PreflightRequest:
        settings = Settings(
            capture=replace(CaptureSettings(), **{"shards": 5, "workers": 1, "batch_tokens": 1024, **(capture or {})}),
            train=replace(
                TrainSettings(), **{"student": str(tiny_student), "per_device_train_batch_size": 2, **(train or {})}
            ),
            stages={
                name: StageSettings(parts=(stage_parts or {}).get(name, ())) for name in ("PT", "DPT", "SFT", "DFT")
            },
        )
        teacher = TeacherSpec(str(tiny_teacher), dtype="float32", device="cpu")
        budget = {name: asked.pop(name) for name in ("fidelity", "bytes_per_token", "max_kl") if name in asked}
        defaults = {"methods": ("llava-kd", "kd"), "rows": 48, "data": preflight_data, "budget": Budget(**budget)}
        return PreflightRequest(teacher, settings=settings, out=str(out), **{**defaults, **asked})

    return make


@pytest.fixture(scope="session")
def preflight_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSpec, ...]:
    """12 captions and 42 chat rows: enough for a sketch of 48-wide states."""
    from pipelines.demo.write_world import write_world

    world = write_world(tmp_path_factory.mktemp("preflight_world"), captions=12, train=42, heldout=7, seed=9)
    return (
        DataSpec("caption", str(world.captions), image_root=str(world.images), template="plain"),
        DataSpec("sft", world.train, template="chat"),
    )


@pytest.fixture(scope="session")
def flown(tmp_path_factory: pytest.TempPathFactory, ask: Callable[..., PreflightRequest]) -> Any:
    """(folder, result, kd.toml before) of a preflight that says GO."""
    folder = tmp_path_factory.mktemp("flown")
    kd_file = folder / "kd.toml"
    kd_file.write_text(KD_TOML)
    return folder, preflight(ask(folder / "preflight", kd_file=kd_file))
