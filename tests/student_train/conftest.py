"""One stage of the product, opened at its first step, and a mixture with everything in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def rich_mixture(world: Any, world_json: Any) -> tuple[Any, ...]:
    """10 captions (plain), 19 usable chat rows, some with two images, and 6 of which one has none; most have many turns."""
    from teacher_cache.sources import DataSpec

    return (
        DataSpec("caption", str(world.captions), image_root=str(world.images), template="plain"),
        DataSpec("sft", str(world_json.train), image_root=str(world_json.images), template="chat"),
        DataSpec("talk", world.train, template="chat", limit=6),
    )


@pytest.fixture(scope="session")
def rich_cache(
    tmp_path_factory: pytest.TempPathFactory, make_request: Callable[..., Any], rich_mixture: Any
) -> Callable[..., Path]:
    """``rich_cache(codec="fp32", k=8, fields=…)`` → a complete cache of ``rich_mixture``, made once for the same arguments."""
    from pipelines.capture.cache_teacher import capture

    made: dict[Any, Path] = {}

    def make(codec: str = "fp32", k: int = 8, fields: tuple[str, ...] | None = None) -> Path:
        if (codec, k, fields) not in made:
            out = tmp_path_factory.mktemp("rich") / "cache"
            request = make_request(out, codec, data=rich_mixture, **({"fields": fields} if fields else {}))
            params = {
                name: {**given, "k": k} if "k" in given else given for name, given in request.field_params.items()
            }
            if "affinity" in request.settings.fields:  # it serves both values of em-kd's knob
                params["affinity"] = {**params.get("affinity", {}), "text": "all"}
            capture(replace(request, field_params=params))
            made[codec, k, fields] = out
        return made[codec, k, fields]

    return make


@pytest.fixture
def open_stage(tmp_path: Path, tiny_student: Path, load_copy: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """``open_stage(cache, stage=…, method=…, …)`` → (trainer, batches_from), exactly as ``train-student`` makes them.

    Unknown keywords are ``TrainSettings``; ``seed`` 0, no TensorBoard.
    """
    from pipelines.settings import Settings
    from pipelines.train.stage_identity import budget
    from pipelines.train.stage_plans import plan_stages
    from pipelines.train.stage_trainer import make_trainer
    from student_train import distributed
    from student_train.config import StageSettings, TrainSettings
    from teacher_cache.reading.cache import TeacherCache
    from teacher_cache.reading.cached_samples import CachedSamples

    def open_(
        cache_url: Path,
        stage: str = "DFT",
        method: str = "llava-kd",
        preset: str = "paper",
        knobs: dict[str, Any] | None = None,
        parts: tuple[str, ...] | None = None,
        student: Path = tiny_student,
        device: str = "cpu",
        coded: bool | None = None,
        **settings: Any,
    ) -> tuple[Any, Any]:
        train = replace(TrainSettings(student=str(student), report_to="none"), **settings)
        cache = TeacherCache(str(cache_url))
        stages = {stage: StageSettings(parts=parts)}
        (plan,) = plan_stages(cache, method, Settings(train=train, stages=stages), stage, preset, knobs)
        rows = CachedSamples(cache, plan.parts, plan.served.names, coded=device != "cpu" if coded is None else coded)
        total, global_batch = budget(plan, sum(rows.counts), 1)
        torch.manual_seed(0)
        model, processor = load_copy(student)
        processes = distributed.Processes(0, 1, torch.device(device))
        folder = tmp_path / f"stage-{len(list(tmp_path.iterdir()))}"
        return make_trainer(cache, plan, rows, model, processor, total, global_batch, processes, folder)

    return open_


@pytest.fixture
def first_step(open_stage: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """``first_step(cache, …)`` → StepResult of step 0: loss and terms of the untouched student, over the rows of one step."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        trainer, batches_from = open_stage(*arguments, **keywords)
        step, batches = next(iter(batches_from(0)))
        return trainer.step(step, batches)

    return run
