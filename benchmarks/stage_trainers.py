"""A stage of training on a world's cache, built from the product's own pieces, as the benchmarks of steps time it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.worlds import World
from pipelines.settings import Settings
from pipelines.train.stage_plans import StagePlan, plan_stages
from pipelines.train.stage_trainer import make_trainer
from student_train.compression import install, settle, with_grid
from student_train.compressors import CompressorSpec
from student_train.config import TrainSettings
from student_train.dataset import TrainBatch
from student_train.distributed import Processes
from student_train.needs import Served
from student_train.trainer import Trainer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples

BatchesFrom = Callable[[int], Iterator[tuple[int, list[TrainBatch]]]]
POOL = "adaptive_pool"


def open_stage(
    world: World,
    cache: TeacherCache,
    method: str,
    batch: int,
    steps: int,
    knobs: Mapping[str, Any] | None = None,
    workers: int = 0,
    pooled: bool = False,
    served: Served | None = None,
    packing: bool = False,
) -> tuple[StagePlan, Trainer, BatchesFrom]:
    """(what was decided, trainer of a fresh student in training mode, its batches from any step on): projector and language model train.

    Args:
        batch: rows of a step, in one micro-batch. pooled: the student's vision tokens are average-pooled, as em-kd's are by default.
        served: in place of the fields that the plan would read.
    """
    settings = TrainSettings(
        student="",  # it is made here, and has no folder
        per_device_train_batch_size=batch,
        learning_rate=1e-5,
        dataloader_num_workers=workers,
        bf16=world.device.startswith("cuda"),
        report_to="none",
        packing=packing,
    )
    stage = "SFT" if method == "sft" else "DFT"
    (plan,) = plan_stages(cache, method, Settings(train=settings), stage, "paper", knobs)
    plan = plan if served is None else replace(plan, served=served)
    student, processor = world.student(), world.processor
    if pooled:
        spec = settle(CompressorSpec(POOL), student.config, processor, "student")
        assert spec is not None
        install(student, spec)
        processor = with_grid(processor, spec, training=True)
    rows = CachedSamples(cache, plan.parts, plan.served.names, coded=not world.device.startswith("cpu"))
    processes = Processes(0, 1, torch.device(world.device))
    folder = Path(str(cache.storage)) / "run"
    trainer, batches_from = make_trainer(cache, plan, rows, student, processor, batch * steps, batch, processes, folder)
    trainer.model.train()
    return plan, trainer, batches_from
