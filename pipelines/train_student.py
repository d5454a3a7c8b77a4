"""``kdcli train-student``: stage after stage over one cache, each resumable, a Hugging Face folder at the end of each."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipelines.output_lock import alone
from pipelines.settings import Settings
from pipelines.stage_check import Checked, chain_of, check_stages, check_whole, next_start
from pipelines.stage_identity import Found, begun, check_same, settled_budget, stage_identity, start_hash, start_of
from pipelines.stage_plans import StagePlan, plan_stages, settle_compressor
from pipelines.stage_records import last_card, stage_card, write_run_card
from pipelines.stage_trainer import MAPS, OpenSignals, make_trainer, save_maps
from pipelines.token_ids import check_vocabulary
from pipelines.trackers import TrackedStage, check_trackers, open_trackers
from student_train import distributed
from student_train.cache import Cache, CachedRows
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
from student_train.whole import DONE_FILE, FILES, check_model, files_below, sums, sync_files, write_sealed
from teacher_cache import stopping
from teacher_cache.errors import CompatibilityError, KdcliError, naming_full_disk
from teacher_cache.plan import content_hash
from teacher_cache.shards.disk_cache import DiskCache
from teacher_cache.shards.storage import sync_folder
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
    told = say if processes.is_main else lambda text: None
    run = Run(cache, output, processes, on_step, open_signals, told)
    with ExitStack() as held:
        with naming_full_disk(output):
            processes.main_alone(lambda: held.enter_context(alone(output, "kdcli train-student", "--output-dir", told)))
            run.prepare(plans, train_settings.student)
        for note in dict.fromkeys(notes + [note for plan in plans for note in plan.served.notes]):
            told(f"note: {note}")
        model_id, results = train_settings.student, []
        try:
            with stopping.held():
                for plan in plans:
                    stop_together(processes, f"{output}: stage {plan.stage.name} had not begun; {AGAIN}")
                    with naming_full_disk(output):
                        results.append(run.stage(plan, model_id))
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


@dataclass
class Run:
    """One command in its folder, which it holds alone.

    Attributes:
        say: gets notes, on the main process. there: what each stage's folder holds.
        start: hash of what the next stage begins with; before: the finished stages so far, as the next one remembers them.
    """

    cache: Cache
    output: Path
    processes: Processes
    on_step: OnStep
    open_signals: OpenSignals
    say: Callable[[str], None]
    start: str = ""
    there: dict[str, Found | None] = field(default_factory=dict)
    before: list[dict[str, Any]] = field(default_factory=list)

    def rows_of(self, plan: StagePlan) -> CachedRows:
        return CachedRows(self.cache, plan.parts, plan.served.names, local_cache(plan.settings))

    def prepare(self, plans: list[StagePlan], student: str) -> None:
        """Every stage against what its folder holds; behind that, the first writes: ``run.json``."""
        self.start = start_hash(student)
        checked = check_stages(self.cache, plans, self.start, self.output, self.processes.world, self.rows_of)
        again = self.processes.told(self.processes.main_alone(lambda: self._settle(checked)))[0]
        self.there = {one.folder.name: begun(one.folder) if one.folder.name in again else one.there for one in checked}

    def _settle(self, checked: list[Checked]) -> list[str]:
        """The folders of finished stages that are made again: they are finished no more."""
        again = check_whole(checked, self.say)
        for one in again:
            (one.folder / DONE_FILE).unlink()
            sync_folder(one.folder)
        write_run_card(self.output, [stage_card(self.cache, one.plan) for one in checked], self.say)
        return [one.folder.name for one in again]

    def stage(self, plan: StagePlan, model_id: str) -> dict[str, Any]:
        """Train one stage, or find it done. Its folder holds metrics, checkpoints, and the model as a Hugging Face folder."""
        folder, there = plan.folder(self.output), self.there[plan.folder(self.output).name]
        rows = self.rows_of(plan)
        check_local_cache(rows, plan.settings)
        world = self.processes.world
        started, total, global_batch = settled_budget(plan, sum(rows.counts), world, there.identity if there else None)
        identity = stage_identity(self.cache, plan, total, global_batch, self.start, started)
        if there:
            check_same(folder, there, identity, self.before)
        if there and there.finished:
            self.start = next_start(folder, there)
            done = there.body
        else:
            if there and started != world:
                self.say(
                    f"note: stage {plan.stage.name} was begun with {started} processes and continues with {world}: "
                    f"{global_batch} samples a step as before"
                )
            done = self.train_stage(plan, folder, model_id, rows, total, global_batch, identity)
            self.start = done["weights"]
        self.before = [*self.before, chain_of(done, folder, last_card(done) or {})]
        return {**done["result"], "model": str(folder / "model")}  # the folder may have been moved since

    def train_stage(
        self,
        plan: StagePlan,
        folder: Path,
        model_id: str,
        rows: CachedRows,
        total: int,
        global_batch: int,
        identity: dict[str, Any],
    ) -> dict[str, Any]:
        """From its start or its newest checkpoint to its end; what ``done.json`` then says. Stopped where a signal came before."""
        processes, s = self.processes, plan.settings
        torch.manual_seed(s.seed)
        model, processor = load_student(model_id, s.attn_implementation, s.trust_remote_code, plan.compressor)
        if processes.is_main:
            check_savable(model, processor, folder, model_id)
        maps_before = Path(model_id).parent / MAPS
        trainer, batches_from = make_trainer(
            self.cache,
            plan,
            rows,
            model,
            processor,
            total,
            global_batch,
            processes,
            folder,
            self.open_signals,
            maps_before,
        )
        trainer.identity, trainer.before, trainer.say = identity, self.before, self.say
        trainer.card = stage_card(self.cache, plan)
        trainer.open_trackers = lambda first: open_trackers(
            s.trackers(), TrackedStage(folder, first, content_hash(plain(identity)), trainer.card), self.say
        )
        stop_together(processes, f"{folder}: no step was made; {AGAIN}")
        left_out = LeftOut(folder, self.say)

        def stepped(step: int, result: StepResult) -> None:
            left_out.count(result)
            self.on_step(folder.name, step, trainer.total_steps, result)

        made = trainer.train(batches_from, stepped)
        left_out.tell()
        if made < trainer.total_steps:
            stop_together(processes, f"{folder}: step {made} of {trainer.total_steps} is in a checkpoint; {AGAIN}")
        result = {
            "stage": plan.stage.name,
            "model": str(folder / "model"),
            "steps": trainer.total_steps,
            "samples": total,
        }
        card = {"identity": identity, "result": result, "starts": trainer.starts, "before": self.before}
        return finish(folder, trainer, processor, maps_before, card)


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


def plain(body: Any) -> Any:
    """As JSON has it: tuples are lists."""
    return json.loads(json.dumps(body, default=str))


def finish(folder: Path, trainer: Trainer, processor: Any, maps_before: Path, card: dict[str, Any]) -> dict[str, Any]:
    """Maps, the model folder, then ``done.json``, which knows them by their sums: a stage is finished when that file is there.

    All of it is on the disk before it gets its name. Returns what ``done.json`` says, on every process.
    """
    student = trainer.model
    whole = gathered(student)  # None: every process has the whole student

    def write() -> dict[str, Any]:
        weights = whole or student.state_dict()
        maps = {name.removeprefix("maps."): one for name, one in weights.items() if name.startswith("maps.")}
        save_maps(folder / MAPS, maps, maps_before)
        own = {name.removeprefix("model."): one for name, one in weights.items() if name.startswith("model.")}
        model, draft = folder / "model", folder / ".model-draft"
        for left in (draft, model):  # of a run that was killed here, or whose model was damaged
            shutil.rmtree(left, ignore_errors=True)
        save_student(student.model, processor, draft, own if whole else None)
        sync_files(draft)
        draft.rename(model)
        sync_folder(folder)
        kept = [MAPS] if (folder / MAPS).is_file() else []
        files = sums(folder, [*(f"model/{name}" for name in files_below(model)), *kept])
        done = plain({**card, "weights": start_of(folder, files), FILES: files})
        write_sealed(folder / DONE_FILE, done)
        return done

    return trainer.processes.told(trainer.processes.main_alone(write))[0]


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
