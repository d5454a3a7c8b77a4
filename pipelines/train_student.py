"""``kdcli train-student``: stage after stage over one cache, each resumable, a Hugging Face folder at the end of each."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipelines.settings import Settings
from pipelines.stage_plans import StagePlan, check_vocabulary, plan_stages, settle_compressor
from pipelines.stage_trainer import MAPS, OpenSignals, load_maps, make_trainer, save_maps
from student_train import distributed
from student_train.cache import Cache, CachedRows
from student_train.distributed import Processes
from student_train.losses.liger import check_liger
from student_train.methods import hook
from student_train.student import load_student, save_student
from student_train.teacher_view import TeacherSignals
from student_train.trainer import StepResult
from teacher_cache.errors import CompatibilityError, KdcliError, naming_full_disk
from teacher_cache.plan import content_hash, difference
from teacher_cache.teachers.transformers import TeacherSpec, load_processor, weights_hash

OnStep = Callable[[str, int, int, StepResult], None]


def train(
    cache_url: str,
    method: str,
    settings: Settings,
    stages: str | None = None,
    preset: str = "paper",
    knobs: Mapping[str, Any] | None = None,
    on_step: OnStep = lambda stage, step, steps, result: None,
    say: Callable[[str], None] = lambda text: None,
    open_signals: OpenSignals = TeacherSignals.open,
) -> dict[str, Any]:
    """Train one student through its stages. Every check that needs no model runs first.

    Args:
        open_signals: where the teacher's side of a batch comes from.

    Returns:
        ``{"output": folder, "model": last Hugging Face folder, "stages": [...]}``
    """
    train_settings = settings.train
    if not train_settings.student:
        raise KdcliError("no student: give --student MODEL, or `student = …` under [train] in kd.toml")
    cache = Cache(cache_url)
    plans = plan_stages(cache, method, settings, stages, preset, knobs)
    plans, notes = settle(cache, plans, train_settings.student)
    output = Path(train_settings.output_dir)
    processes = distributed.start()
    if any(plan.settings.use_liger_kernel for plan in plans):
        check_liger(processes.device)
    if processes.is_main:
        with naming_full_disk(output):
            write_run_card(output, cache, plans)
        for note in dict.fromkeys(notes + [note for plan in plans for note in plan.served.notes]):
            say(f"note: {note}")
    processes.barrier()
    model_id, results = train_settings.student, []
    for plan in plans:
        with naming_full_disk(output):
            results.append(run_stage(cache, plan, model_id, output, processes, on_step, open_signals))
        model_id = results[-1]["model"]
    distributed.stop()
    return {"output": str(output), "model": model_id, "stages": results}


def settle(cache: Cache, plans: list[StagePlan], student: str) -> tuple[list[StagePlan], list[str]]:
    """The plans as this student can have them, and notes for the user; refuses a student that cannot, before its weights are read."""
    processor, config = load_processor(TeacherSpec(student))
    for plan in plans:
        fields = {name: cache.fields[name] for name in plan.served.names}
        hook(plan.method, "check_student")(config, fields)
        check_head(config, fields, student)
    plans = settle_compressor(plans, student)
    return plans, check_vocabulary(cache, plans, processor)


def check_head(config: Any, fields: Mapping[str, Any], student: str) -> None:
    """CompatibilityError where the student's head has fewer rows than the vocabulary that the teachers of these fields speak."""
    width = config.get_text_config().vocab_size
    for name, body in fields.items():
        spoken = min(body["teacher"]["head_width"], body["teacher"]["tokenizer"]["length"])
        if width < spoken:
            raise CompatibilityError(
                f"{student}: its head has {width} rows, the teacher of field {name} speaks {spoken} tokens: resize the student's embeddings"
            )


def write_run_card(output: Path, cache: Cache, plans: list[StagePlan]) -> None:
    """``run.json``: the resolved settings, versions and git commit, beside the results they explain."""
    import transformers

    output.mkdir(parents=True, exist_ok=True)
    body = {
        "cache": str(cache.storage),
        "plan_hash": cache.plan_hash,
        "stages": [
            {
                "stage": plan.stage.name,
                "method": plan.method_name,
                "knobs": asdict(plan.method),  # type: ignore[call-overload]
                "parts": plan.parts,
                "fields": {need: list(fields) for need, fields in plan.served.fields.items()},
                "settings": asdict(plan.settings),
                "compressor": plan.compressor and plan.compressor.entry(),
            }
            for plan in plans
        ],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "git": git_commit(),
    }
    (output / "run.json").write_text(json.dumps(body, indent=1) + "\n")


def git_commit() -> str | None:
    """Commit of the program's own checkout, None where it is installed without one."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def run_stage(
    cache: Cache,
    plan: StagePlan,
    model_id: str,
    output: Path,
    processes: Processes,
    on_step: OnStep,
    open_signals: OpenSignals = TeacherSignals.open,
) -> dict[str, Any]:
    """Train one stage, or find it done. Its folder holds metrics, checkpoints, and the model as a Hugging Face folder."""
    folder = plan.folder(output)
    rows = CachedRows(cache, plan.parts, plan.served.names)
    total, global_batch = budget(plan, sum(rows.counts), processes.world)
    identity = stage_identity(cache, plan, total, global_batch, model_id, processes.world)
    done = folder / "done.json"
    if done.is_file():
        finished = json.loads(done.read_text())
        if finished["identity"] != identity:
            lines = "; ".join(difference(finished["identity"], identity)).replace("cache ", "there ")
            raise KdcliError(f"{folder} holds another finished stage: {lines}: choose another --output-dir")
        return {**finished["result"], "model": str(folder / "model")}  # the folder may have been moved since
    torch.manual_seed(plan.settings.seed)
    model, processor = load_student(model_id, plan.settings.attn_implementation, compressor=plan.compressor)
    trainer, batches_from = make_trainer(
        cache, plan, rows, model, processor, total, global_batch, processes, folder, open_signals
    )
    trainer.identity = identity
    maps_before = Path(model_id).parent / MAPS
    load_maps(maps_before, trainer.model.maps)
    trainer.train(batches_from, lambda step, result: on_step(folder.name, step, trainer.total_steps, result))
    result = {"stage": plan.stage.name, "model": str(folder / "model"), "steps": trainer.total_steps, "samples": total}
    if processes.is_main:
        save_maps(folder / MAPS, trainer.model.maps, maps_before)
        finish(folder, model, processor, {"identity": identity, "result": result})
    processes.barrier()
    return result


def finish(folder: Path, model: Any, processor: Any, card: dict[str, Any]) -> None:
    """The model folder, then ``done.json``: a stage is finished when that file is there."""
    save_student(model, processor, folder / "model")
    draft = folder / ".done.json"
    draft.write_text(json.dumps(card, indent=1) + "\n")
    os.replace(draft, folder / "done.json")


def budget(plan: StagePlan, rows: int, world: int) -> tuple[int, int]:
    """(samples the stage sees, samples of one optimizer step)."""
    s = plan.settings
    global_batch = s.per_device_train_batch_size * s.gradient_accumulation_steps * world
    if rows == 0:
        raise KdcliError(f"stage {plan.stage.name}: the cache holds no rows of part {', '.join(plan.parts)}")
    total = s.max_steps * global_batch if s.max_steps else round(s.num_train_epochs * rows)
    if total < world:
        raise KdcliError(
            f"stage {plan.stage.name}: {rows} rows × {s.num_train_epochs:g} epochs give no step for {world} processes: "
            "raise --num-train-epochs or --max-steps, or leave the stage out of --stages"
        )
    return total, global_batch


def stage_identity(
    cache: Cache, plan: StagePlan, total: int, global_batch: int, model_id: str, world: int = 1
) -> dict[str, Any]:
    """What must be equal for a checkpoint of this stage to be continued.

    A method that draws (ratios of EPIC, columns of em-kd) draws for every micro-batch of every process: how a step is cut counts too.
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
        **({"micro_batches": [plan.settings.per_device_train_batch_size, world]} if draws(plan.method) else {}),
        "start": start_hash(model_id),
    }


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
