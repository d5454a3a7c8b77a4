"""What a stage is, so that a folder can be continued, found done, or refused: its samples, its steps, its identity."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.stage_plans import StagePlan
from pipelines.stage_trainer import MAPS
from student_train.cache import Cache
from student_train.checkpoint import checkpoints, read_card, read_state
from student_train.draws import VERSION as DRAWS
from student_train.methods import hook
from teacher_cache.errors import KdcliError
from teacher_cache.plan import content_hash
from teacher_cache.teachers.transformers import TeacherSpec, weights_hash

DONE = {"identity": dict, "result": dict}
"""What ``done.json`` of a finished stage holds."""


def begun(folder: Path) -> dict[str, Any] | None:
    """Identity of what a stage's folder holds, finished or to be continued; None where nothing is."""
    done, saved = folder / "done.json", checkpoints(folder / "checkpoints")
    if done.is_file():
        return read_card(done, DONE)["identity"]
    return read_state(saved[-1])["identity"] if saved else None


def settled_budget(plan: StagePlan, rows: int, world: int, there: Mapping[str, Any] | None) -> tuple[int, int, int]:
    """(processes that the stage is reckoned for, samples it sees, samples of one optimizer step).

    Args:
        there: identity of a stage to be continued. With another number of processes its steps keep their samples, whether the
            settings give as many for the processes that it was begun with, or for those that are here now.
    """
    began = int(there.get("processes", 1)) if there else world
    found = {processes: budget(plan, rows, processes) for processes in (world, began)}
    if there and any((there["samples"], there["global_batch"]) == one for one in found.values()):
        return began, there["samples"], there["global_batch"]
    return world, *found[world]


def budget(plan: StagePlan, rows: int, world: int) -> tuple[int, int]:
    """(samples the stage sees, samples of one optimizer step) with so many processes from the start."""
    s = plan.settings
    if rows == 0:
        raise KdcliError(f"stage {plan.stage.name}: the cache holds no rows of part {', '.join(plan.parts)}")
    global_batch = s.per_device_train_batch_size * s.gradient_accumulation_steps * world
    total = s.max_steps * global_batch if s.max_steps else round(s.num_train_epochs * rows)
    if total < 1:
        raise KdcliError(
            f"stage {plan.stage.name}: {rows} rows × {s.num_train_epochs:g} epochs give no step: "
            "raise --num-train-epochs or --max-steps, or leave the stage out of --stages"
        )
    return total, global_batch


def stage_identity(
    cache: Cache, plan: StagePlan, total: int, global_batch: int, model_id: str, processes: int = 1
) -> dict[str, Any]:
    """What must be equal for a checkpoint of this stage to be continued.

    A method that draws (ratios of EPIC, columns of em-kd) draws for every micro-batch of every process: how a process cuts a step
    counts too. With another number of processes it draws others.

    Args:
        processes: that the stage was begun with.
    """
    return {
        "plan_hash": cache.plan_hash,
        "fields": {name: cache.fields[name]["sha256"] for name in plan.served.names},
        "method": plan.method_name,
        "knobs": asdict(plan.method),  # type: ignore[call-overload]
        "parts": list(plan.parts),
        "samples": total,
        "global_batch": global_batch,
        "settings": {
            name: getattr(plan.settings, name)
            for name in (
                "learning_rate",
                "weight_decay",
                "warmup_ratio",
                "max_grad_norm",
                "adam_beta1",
                "adam_beta2",
                "seed",
                "bf16",
                "max_length",
                "use_liger_kernel",
            )
        },
        **({"vision_tower_learning_rate": tower} if (tower := plan.settings.vision_tower_learning_rate) else {}),
        **({"compressor": plan.compressor.entry()} if plan.compressor else {}),
        **({"processes": processes} if processes > 1 else {}),
        **(drawn(plan.settings.per_device_train_batch_size, processes) if draws(plan.method) else {}),
        "start": start_hash(model_id),
    }


def drawn(batch_size: int, processes: int) -> dict[str, Any]:
    """What decides the draws of a method that draws: how a process cuts a step, and how seeds are made."""
    return {"micro_batches": [batch_size, processes], "draws": DRAWS}


def draws(method: Any) -> bool:
    """Whether a method draws something for every micro-batch."""
    return hasattr(method, "passes") or bool(getattr(hook(method, "alignment")(), "columns", 0))


def start_hash(model_id: str) -> str:
    """Hash of what a stage starts from, configuration, weights and learned maps: checkpoints hold the trained weights only."""
    folder = Path(model_id)
    if not folder.is_dir():
        return model_id
    parts = [(folder / "config.json").read_text(), weights_hash(TeacherSpec(model_id), None)]
    maps = folder.parent / MAPS
    return content_hash([*parts, hashlib.sha256(maps.read_bytes()).hexdigest()] if maps.is_file() else parts)
