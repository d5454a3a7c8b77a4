"""What one cached training step of the student costs on this machine: seconds and peak memory, rough."""

from __future__ import annotations

import resource
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipelines.train.stage_plans import StagePlan
from pipelines.train.stage_trainer import make_trainer
from student_train.distributed import Processes
from student_train.load_student import load_student
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples

STEPS = 3
"""The first allocates, the last is measured."""
MOST_SAMPLES = {"cpu": 2}
"""Of the measured micro-batch: a CPU takes as long for each of more, and their activations are most of the memory."""


def step_cost(cache: TeacherCache, plan: StagePlan, student: str, device: torch.device) -> dict[str, Any]:
    """``{"stage", "samples", "tokens", "seconds", "peak_bytes", "of", "optimizer_step_seconds"}`` of one micro-batch.

    peak_bytes: on a GPU what torch allocated for it; on a CPU the most that this whole process ever held, an upper bound.
    """
    rows = CachedSamples(cache, plan.parts, plan.served.names, coded=device.type != "cpu")
    batch = plan.settings.per_device_train_batch_size
    micro = min(batch, MOST_SAMPLES.get(device.type, batch), max(1, sum(rows.counts) // STEPS))
    accumulate = plan.settings.gradient_accumulation_steps
    settings = replace(
        plan.settings,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=1,
        max_steps=STEPS,
        warmup_ratio=0.0,
        learning_rate=0.0,
        dataloader_num_workers=0,
        report_to="none",
    )
    model, processor = load_student(student, settings.attn_implementation, settings.trust_remote_code, plan.compressor)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder:
        stage = replace(plan, settings=settings)
        processes = Processes(0, 1, device)
        trainer, batches_from = make_trainer(
            cache, stage, rows, model, processor, STEPS * micro, micro, processes, Path(folder)
        )
        trainer.model.train()
        results = [trainer.step(step, batches) for step, batches in batches_from(0)]
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else peak_of_process()
    return {
        "stage": plan.stage.name,
        "samples": micro,
        "tokens": results[-1].tokens,
        "seconds": results[-1].seconds,
        "optimizer_step_seconds": results[-1].seconds * accumulate * batch / micro,
        "peak_bytes": peak,
        "of": "the GPU" if on_gpu else "this whole process",
    }


def peak_of_process() -> int:
    """Bytes; Linux counts kilobytes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
