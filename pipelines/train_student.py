"""``kdcli train-student``: stage after stage over one cache, each resumable, a Hugging Face folder at the end of each."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.settings import Settings
from pipelines.stage_identity import DONE, begun, settled_budget, stage_identity
from pipelines.stage_plans import StagePlan, plan_stages, settle_compressor
from pipelines.stage_trainer import MAPS, OpenSignals, make_trainer, save_maps
from pipelines.token_ids import check_vocabulary
from pipelines.trackers import TrackedStage, check_trackers, open_trackers
from student_train import distributed
from student_train.cache import Cache, CachedRows
from student_train.checkpoint import read_card
from student_train.config import TrainSettings
from student_train.distributed import Processes, gathered
from student_train.losses.liger import check_liger
from student_train.methods import hook
from student_train.metrics_log import StepResult
from student_train.savable import check_savable, refuse_quantized
from student_train.stream import BLOCK_SHARDS
from student_train.student import load_student, save_student
from student_train.teacher_view import TeacherSignals
from student_train.trainer import Trainer
from teacher_cache import stopping
from teacher_cache.errors import CompatibilityError, KdcliError, naming_full_disk
from teacher_cache.plan import content_hash, difference
from teacher_cache.shards.disk_cache import DiskCache
from teacher_cache.stopping import Stopped
from teacher_cache.teachers import null
from teacher_cache.teachers.transformers import TeacherSpec, load_processor

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
    check_trackers(train_settings.trackers())
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
    try:
        with stopping.held():
            for plan in plans:
                stop_together(processes, f"{output}: stage {plan.stage.name} had not begun; {AGAIN}")
                with naming_full_disk(output):
                    results.append(run_stage(cache, plan, model_id, output, processes, on_step, open_signals, say))
                model_id = results[-1]["model"]
            stop_together(processes, f"{output}: every stage is finished")
        stopped = None
    except Stopped as stop:
        stopped = stop.with_traceback(
            None
        )  # whose frames hold the trainer: it must be gone before the processes' group is
    distributed.stop()
    if stopped:
        raise stopped
    return {"output": str(output), "model": model_id, "stages": results}


AGAIN = "run the same command again to continue"


def stop_together(processes: Processes, where: str) -> None:
    """Stopped, in every process, where one of them was asked to: several need not get the same signals.

    Args:
        where: the run stands, for the line that is printed.
    """
    if processes.sum([float(stopping.asked() > 0)])[0]:
        raise Stopped(stopping.asked() or signal.SIGTERM, where)


def settle(cache: Cache, plans: list[StagePlan], student: str) -> tuple[list[StagePlan], list[str]]:
    """The plans as this student can have them, and notes for the user; refuses a student that cannot, before its weights are read."""
    trusted = plans[0].settings.trust_remote_code
    processor, config = load_processor(TeacherSpec(student, trust_remote_code=trusted))
    refuse_quantized(config, student)
    made_up: set[str] = set()
    for plan in plans:
        fields = {name: cache.fields[name] for name in plan.served.names}
        made_up |= {name for name, body in fields.items() if body["teacher"].get("backend") == null.BACKEND}
        hook(plan.method, "check_student")(config, fields)
        check_head(config, fields, student)
    plans = settle_compressor(plans, student)
    notes = check_vocabulary(cache, {name for plan in plans for name in plan.served.names}, processor)
    if made_up:
        notes = [*notes, f"{', '.join(sorted(made_up))}: {null.NOTE}"]
    return plans, notes


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
        "stages": [stage_card(cache, plan) for plan in plans],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "git": git_commit(),
    }
    (output / "run.json").write_text(json.dumps(body, indent=1) + "\n")


def stage_card(cache: Cache, plan: StagePlan) -> dict[str, Any]:
    """What a stage was told, resolved."""
    return {
        "stage": plan.stage.name,
        "method": plan.method_name,
        "knobs": asdict(plan.method),  # type: ignore[call-overload]
        "parts": plan.parts,
        "templates": {part: cache.template(part) for part in plan.parts},
        "fields": {need: list(fields) for need, fields in plan.served.fields.items()},
        "settings": asdict(plan.settings),
        "compressor": plan.compressor and plan.compressor.entry(),
    }


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
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train one stage, or find it done. Its folder holds metrics, checkpoints, and the model as a Hugging Face folder."""
    folder = plan.folder(output)
    coded = processes.device.type != "cpu"  # on a CPU the loader processes make the numbers, beside the step
    rows = CachedRows(cache, plan.parts, plan.served.names, local_cache(plan.settings), coded)
    check_local_cache(rows, plan.settings)
    there = begun(folder)
    started, total, global_batch = settled_budget(plan, sum(rows.counts), processes.world, there)
    identity = stage_identity(cache, plan, total, global_batch, model_id, started)
    if (folder / "done.json").is_file():
        return finished_result(folder, identity)
    if there and started != processes.world and processes.is_main:
        say(
            f"note: stage {plan.stage.name} was begun with {started} processes and continues with {processes.world}: "
            f"{global_batch} samples a step as before"
        )
    torch.manual_seed(plan.settings.seed)
    model, processor = load_student(
        model_id, plan.settings.attn_implementation, plan.settings.trust_remote_code, plan.compressor
    )
    if processes.is_main:
        check_savable(model, processor, folder, model_id)
    maps_before = Path(model_id).parent / MAPS
    trainer, batches_from = make_trainer(
        cache, plan, rows, model, processor, total, global_batch, processes, folder, open_signals, maps_before
    )
    trainer.identity = identity
    trainer.open_trackers = lambda first: open_trackers(
        plan.settings.trackers(), tracked_stage(cache, plan, folder, first, identity), say
    )
    stop_together(processes, f"{folder}: no step was made; {AGAIN}")
    left_out = LeftOut(folder, say)

    def stepped(step: int, result: StepResult) -> None:
        left_out.count(result)
        on_step(folder.name, step, trainer.total_steps, result)

    made = trainer.train(batches_from, stepped)
    left_out.tell()
    if made < trainer.total_steps:
        stop_together(processes, f"{folder}: step {made} of {trainer.total_steps} is in a checkpoint; {AGAIN}")
    result = {"stage": plan.stage.name, "model": str(folder / "model"), "steps": trainer.total_steps, "samples": total}
    finish(folder, trainer, processor, maps_before, {"identity": identity, "result": result})
    return result


def finished_result(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What ``run_stage`` returned when it ended; KdcliError where that was another stage."""
    finished = read_card(folder / "done.json", DONE)
    if finished["identity"] != identity:
        lines = "; ".join(difference(finished["identity"], identity)).replace("cache ", "there ")
        raise KdcliError(f"{folder} holds another finished stage: {lines}: choose another --output-dir")
    return {**finished["result"], "model": str(folder / "model")}  # the folder may have been moved since


@dataclass
class LeftOut:
    """Rows of a stage that its student's processor refused: the first is named when it is met, all are counted at the end."""

    folder: Path
    say: Callable[[str], None]
    rows: int = 0

    def count(self, result: StepResult) -> None:
        if result.refused and not self.rows:
            line = result.left_out[0] if result.left_out else "another process's row: the student does not take it"
            self.say(f"note: {line}: left out; {self.folder}/metrics.jsonl counts such rows (refused)")
        self.rows += result.refused

    def tell(self) -> None:
        if self.rows:
            self.say(
                f"note: {self.folder.name} left out {self.rows} rows since its start that the student does not take"
            )


def tracked_stage(cache: Cache, plan: StagePlan, folder: Path, first: int, identity: Mapping[str, Any]) -> TrackedStage:
    config = {"cache": str(cache.storage), "plan_hash": cache.plan_hash, **stage_card(cache, plan)}
    return TrackedStage(folder, first, content_hash(plain(identity)), plain(config))


def plain(body: Any) -> Any:
    """As JSON has it: tuples are lists."""
    return json.loads(json.dumps(body, default=str))


def finish(folder: Path, trainer: Trainer, processor: Any, maps_before: Path, card: dict[str, Any]) -> None:
    """Maps, the model folder, then ``done.json``: a stage is finished when that file is there."""
    student = trainer.model
    whole = gathered(student)  # None: every process has the whole student
    if trainer.processes.is_main:
        weights = whole or student.state_dict()
        maps = {name.removeprefix("maps."): one for name, one in weights.items() if name.startswith("maps.")}
        save_maps(folder / MAPS, maps, maps_before)
        own = {name.removeprefix("model."): one for name, one in weights.items() if name.startswith("model.")}
        save_student(student.model, processor, folder / "model", own if whole else None)
        draft = folder / ".done.json"
        draft.write_text(json.dumps(card, indent=1) + "\n")
        os.replace(draft, folder / "done.json")
    trainer.processes.barrier()


def local_cache(settings: TrainSettings) -> DiskCache | None:
    return DiskCache(settings.local_cache, int(settings.local_cache_gb * 1e9)) if settings.local_cache else None


def check_local_cache(rows: CachedRows, settings: TrainSettings) -> None:
    """KdcliError where the tars that are read at a time do not fit into the local cache."""
    least = rows.largest_block(BLOCK_SHARDS) / 1e9
    if rows.remote and settings.local_cache and settings.local_cache_gb < least:
        raise KdcliError(
            f"--local-cache-gb {settings.local_cache_gb:g}: {BLOCK_SHARDS} shards are read at a time, and take up to {least:.3g} GB: "
            "allow that at least, twice that to fetch the next ones meanwhile, or leave --local-cache out"
        )
