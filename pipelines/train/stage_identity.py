"""What a stage is, so that a folder can be continued, found done, or refused: its samples, its steps, its identity."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.train.stage_plans import StagePlan
from pipelines.train.stage_trainer import MAPS
from student_train.checkpoint import newest_state
from student_train.config import TrainSettings
from student_train.draws import VERSION as DRAWS
from student_train.methods import draws
from student_train.whole import DONE_FILE, read_done
from teacher_cache.errors import KdcliError
from teacher_cache.planning.plan import content_hash, difference
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.schema import misfit
from teacher_cache.teachers.transformers import TeacherSpec, weights_hash

UNKNOWN = "unknown"
"""Where a stage starts from whose weights are not trained yet."""


@dataclass(frozen=True)
class FoundStage:
    """What a stage's folder holds, by its own record.

    Attributes:
        finished: else it is to be continued from a checkpoint.
        before: ``[{"folder", "identity", …}]`` of the stages that it began from; None: a version of before did not write it.
        body: the whole ``done.json`` or ``state.json``.
    """

    finished: bool
    identity: dict[str, Any]
    before: list[dict[str, Any]] | None
    body: dict[str, Any]


def begun(folder: Path) -> FoundStage | None:
    """What a stage's folder holds; None where nothing of it is trained yet. KdcliError where its record is damaged."""
    done = (folder / DONE_FILE).is_file()
    body = read_done(folder) if done else newest_state(folder / "checkpoints")
    return FoundStage(done, body["identity"], _chain(body), body) if body else None


def _chain(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    found = body.get("before")
    good = isinstance(found, list) and not misfit(found, [{"folder": str, "identity": dict}])
    return found if good else None


def check_same(
    folder: Path, there: FoundStage, identity: Mapping[str, Any], before: Sequence[Mapping[str, Any]]
) -> None:
    """KdcliError with the difference where a folder holds another stage than is asked for, or one that began from others.

    Args:
        identity, before: as asked for. ``start`` may be ``UNKNOWN``: then it is not compared.
    """
    old, new = _comparable(there.identity, there.before, identity, before)
    if old == new:
        return
    lines = "; ".join(difference(old, new))
    if there.finished:
        lines = lines.replace("cache ", "there ")
        raise KdcliError(f"{folder} holds another finished stage: {lines}: choose another --output-dir")
    lines = lines.replace("cache ", "checkpoint ")
    raise KdcliError(f"{folder} was made by another run: {lines}: choose another --output-dir, or remove the folder")


def _comparable(
    old: Mapping[str, Any],
    old_before: Sequence[Mapping[str, Any]] | None,
    new: Mapping[str, Any],
    new_before: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sides as flat documents: the stage's identity, and under ``start FOLDER`` those of the stages before it."""
    sides = dict(old), dict(new)
    if old_before is not None:
        for side, chain in zip(sides, (old_before, new_before)):
            side.update({f"start {one['folder']}": dict(one["identity"]) for one in chain})
    for name in ("", *(name for name in sides[1] if name.startswith("start "))):
        pair = [side.get(name, {}) if name else side for side in sides]
        if pair[1].get("start") == UNKNOWN:
            for one in pair:
                one.pop("start", None)
    return sides


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
    cache: TeacherCache, plan: StagePlan, total: int, global_batch: int, start: str, processes: int = 1
) -> dict[str, Any]:
    """What must be equal for a checkpoint of this stage to be continued.

    A method that draws (ratios of EPIC, columns of em-kd) draws for every micro-batch of every process: how a process cuts a step
    counts too. With another number of processes it draws others.

    Args:
        start: ``start_hash`` of what it starts from. processes: that the stage was begun with.
    """
    return {
        "plan_hash": cache.plan_hash,
        "fields": {name: cache.fields[name]["sha256"] for name in plan.served.names},
        "method": plan.method_name,
        "knobs": identity_knobs(plan.method_name, plan.method),
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
        **plan.terms.identity(),
        **({"vision_tower_learning_rate": tower} if (tower := plan.settings.vision_tower_learning_rate) else {}),
        **({"compressor": plan.compressor.entry()} if plan.compressor else {}),
        **({"processes": processes} if processes > 1 else {}),
        **(drawn(plan.settings, processes) if draws(plan.method) else {}),
        "start": start,
    }


ADDED: Mapping[str, Mapping[str, Any]] = {
    **{name: {"temperature_squared": False} for name in ("minillm-offline", "distillm-offline", "jsd")},
    **{name: {"temperature_squared": True} for name in ("epic-tcd", "epic-lcd")},
    **{name: {"temperature_squared": True, "reg": 1.0} for name in ("llavadi", "align-kd")},
    "llava-kd": {"temperature_squared": False, "reg": 1.0},
    "em-kd": {"temperature_squared": False, "divergence": "reverse"},
}
"""Knobs that a method got later, and what versions without them did."""


def identity_knobs(name: str, method: Any) -> dict[str, Any]:
    """A method's knobs, without a later one that says what was done before there was one: checkpoints of then are gone on with."""
    knobs, added = asdict(method), dict(ADDED.get(name, {}))
    if "temperature_squared" in added and knobs.get("temperature") == 1.0:
        added["temperature_squared"] = knobs["temperature_squared"]  # either way the factor is 1
    return {knob: value for knob, value in knobs.items() if knob not in added or value != added[knob]}


def drawn(settings: TrainSettings, processes: int) -> dict[str, Any]:
    """What decides the draws of a method that draws: how a process cuts a step, the order of its samples, and how seeds are made."""
    by_length = settings.gradient_accumulation_steps * processes > 1
    return {
        "micro_batches": [settings.per_device_train_batch_size, processes],
        "draws": DRAWS,
        **({"grouped": True} if by_length else {}),
        **({"packing": True} if settings.packing else {}),
    }


def start_hash(model_id: str) -> str:
    """Hash of what a stage starts from, configuration, weights and learned maps: checkpoints hold the trained weights only."""
    folder = Path(model_id)
    if not folder.is_dir():
        return model_id
    parts = [(folder / "config.json").read_text(), weights_hash(TeacherSpec(model_id), None)]
    maps = folder.parent / MAPS
    return content_hash([*parts, hashlib.sha256(maps.read_bytes()).hexdigest()] if maps.is_file() else parts)


def start_of(stage: Path, files: Mapping[str, Any]) -> str:
    """``start_hash`` of a stage's model by the sums of its files, none of which is read again."""
    total = hashlib.sha256()
    for name in sorted(name for name in files if name.startswith("model/") and name.endswith(".safetensors")):
        if name.count("/") == 1:
            total.update(name.removeprefix("model/").encode() + bytes.fromhex(files[name][1]))
    parts = [(stage / "model/config.json").read_text(), total.hexdigest()]
    return content_hash([*parts, files[MAPS][1]] if MAPS in files else parts)
