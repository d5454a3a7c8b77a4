"""``kdcli train-student``: stage after stage over one cache, each resumable, a Hugging Face folder at the end of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipelines.settings import Settings
from pipelines.train.output_lock import alone
from pipelines.train.stage_plans import StagePlan, plan_stages, settle_compressor
from pipelines.train.stage_run import OnStep, Run
from pipelines.train.stage_trainer import OpenSignals
from pipelines.train.trackers import check_trackers
from student_train import distributed
from student_train.losses.liger import check_liger
from student_train.methods import DEFAULT, hook
from student_train.methods.soft_targets import square_note
from student_train.savable import refuse_quantized
from student_train.teacher_view import TeacherHeads
from student_train.token_ids import check_head, check_vocabulary
from student_train.whole import check_model
from teacher_cache.errors import KdcliError, naming_full_disk
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.places import local_path
from teacher_cache.stopping import Stopped
from teacher_cache.teachers import null
from teacher_cache.teachers.transformers import TeacherSpec, load_processor


def train(
    cache_url: str,
    method: str,
    settings: Settings,
    stages: str | None = None,
    preset: str = DEFAULT,
    knobs: Mapping[str, Any] | None = None,
    on_step: OnStep = lambda stage, step, steps, result: None,
    say: Callable[[str], None] = lambda text: None,
    open_signals: OpenSignals = TeacherHeads.open,
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
    cache = TeacherCache(cache_url)
    check_trackers(train_settings.trackers())
    plans = plan_stages(cache, method, settings, stages, preset, knobs)
    plans, notes = settle(cache, plans, train_settings.student)
    output = local_path(train_settings.output_dir, "--output-dir")
    processes = distributed.start()
    if any(plan.settings.use_liger_kernel for plan in plans):
        check_liger(processes.device)
    run = Run(cache, output, processes, on_step, open_signals, say)
    with ExitStack() as held:
        with naming_full_disk(output):
            processes.main_alone(lambda: held.enter_context(alone(output, "kdcli train-student", "--output-dir", say)))
            run.prepare(plans, train_settings.student)
        for note in dict.fromkeys(notes + [note for plan in plans for note in plan.served.notes]):
            if processes.is_main:
                say(f"note: {note}")
        try:
            results, stopped = run.every(plans, train_settings.student), None
        except Stopped as stop:
            stopped = stop.with_traceback(
                None
            )  # whose frames hold the trainer: it must be gone before the processes' group is
    distributed.stop()
    if stopped:
        raise stopped
    return {"output": str(output), "model": results[-1]["model"], "stages": results}


def settle(cache: TeacherCache, plans: list[StagePlan], student: str) -> tuple[list[StagePlan], list[str]]:
    """The plans as this student can have them, and notes for the user; refuses a student that cannot, before its weights are read."""
    trusted = plans[0].settings.trust_remote_code
    check_model(Path(student))
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
    notes = [*notes, *filter(None, (square_note(plan.method_name, plan.method) for plan in plans))]
    if made_up:
        notes = [*notes, f"{', '.join(sorted(made_up))}: {null.NOTE}"]
    return plans, notes
