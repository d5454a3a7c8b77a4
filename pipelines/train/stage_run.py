"""One ``train-student`` in its folder: stages looked at, trained or found done, and finished so that the next command can tell."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipelines.train.stage_check import Checked, chain_of, check_stages, check_whole, next_start
from pipelines.train.stage_identity import (
    FoundStage,
    begun,
    check_same,
    settled_budget,
    stage_identity,
    start_hash,
    start_of,
)
from pipelines.train.stage_plans import StagePlan
from pipelines.train.stage_records import last_card, stage_card, write_run_card
from pipelines.train.stage_trainer import MAPS, OpenSignals, make_trainer, save_maps
from pipelines.train.trackers import TrackedStage, open_trackers
from student_train.config import TrainSettings
from student_train.distributed import Processes, gathered
from student_train.load_student import load_student, save_student
from student_train.metrics_log import StepResult
from student_train.order import BLOCK_SHARDS
from student_train.savable import check_savable
from student_train.selection import check_columns
from student_train.trainer import Trainer
from student_train.whole import DONE_FILE, FILES, files_below, sums, sync_files, write_sealed
from teacher_cache import stopping
from teacher_cache.errors import KdcliError, naming_full_disk
from teacher_cache.planning.plan import content_hash
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.shards.disk_cache import DiskCache
from teacher_cache.shards.local_disk import sync_folder
from teacher_cache.stopping import CONTINUE, Stopped

OnStep = Callable[[str, int, int, StepResult], None]


def stop_together(processes: Processes, where: str) -> None:
    """Stopped, in every process, where one of them was asked to: several need not get the same signals.

    Args:
        where: the run stands, for the line that is printed.
    """
    if processes.sum([float(stopping.asked() > 0)])[0]:
        raise Stopped(stopping.asked() or signal.SIGTERM, where)


@dataclass
class Run:
    """One command in its folder, which it holds alone.

    Attributes:
        say: gets notes. there: what each stage's folder holds. rows: of the stages to come, whose commits are read.
        start: hash of what the next stage begins with; before: the finished stages so far, as the next one remembers them.
    """

    cache: TeacherCache
    output: Path
    processes: Processes
    on_step: OnStep
    open_signals: OpenSignals
    say: Callable[[str], None]
    start: str = ""
    there: dict[str, FoundStage | None] = field(default_factory=dict)
    rows: dict[str, CachedSamples] = field(default_factory=dict)
    before: list[dict[str, Any]] = field(default_factory=list)

    def rows_of(self, plan: StagePlan) -> CachedSamples:
        """What a stage reads, opened once."""
        name = plan.folder(self.output).name
        if name not in self.rows:
            coded = (
                self.processes.device.type != "cpu"
            )  # on a CPU the loader processes make the numbers, beside the step
            disk = local_cache(plan.settings)
            rows = CachedSamples(self.cache, plan.parts, plan.served.names, disk, coded)
            check_columns(plan.terms.selection, rows.keys, plan.parts)
            self.rows[name] = rows
        return self.rows[name]

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

    def every(self, plans: list[StagePlan], student: str) -> list[dict[str, Any]]:
        """One stage after the other; their results. Stopped between two of them, or behind the last, where a signal came."""
        model_id, results = student, list[dict[str, Any]]()
        with stopping.held():
            for plan in plans:
                stop_together(self.processes, f"{self.output}: stage {plan.stage.name} had not begun; {CONTINUE}")
                with naming_full_disk(self.output):
                    results.append(self.stage(plan, model_id))
                model_id = results[-1]["model"]
            stop_together(self.processes, f"{self.output}: every stage is finished")
        return results

    def stage(self, plan: StagePlan, model_id: str) -> dict[str, Any]:
        """Train one stage, or find it done. Its folder holds metrics, checkpoints, and the model as a Hugging Face folder."""
        folder, there = plan.folder(self.output), self.there[plan.folder(self.output).name]
        rows = self.rows.pop(folder.name)
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
            if there and started != world and self.processes.is_main:
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
        rows: CachedSamples,
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
        stop_together(processes, f"{folder}: no step was made; {CONTINUE}")
        left_out = LeftOut(folder, self.say)

        def stepped(step: int, result: StepResult) -> None:
            left_out.count(result)
            self.on_step(folder.name, step, trainer.total_steps, result)

        made = trainer.train(batches_from, stepped)
        left_out.tell()
        if made < trainer.total_steps:
            stop_together(processes, f"{folder}: step {made} of {trainer.total_steps} is in a checkpoint; {CONTINUE}")
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
            line = result.left_out[0] if result.left_out else "another process's row: the student refuses it"
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


def check_local_cache(rows: CachedSamples, settings: TrainSettings) -> None:
    """KdcliError where the tars that are read at a time do not fit into the local cache."""
    least = rows.largest_block(BLOCK_SHARDS) / 1e9
    if rows.remote and settings.local_cache and settings.local_cache_gb < least:
        raise KdcliError(
            f"--local-cache-gb {settings.local_cache_gb:g}: {BLOCK_SHARDS} shards are read at a time, and take up to {least:.3g} GB: "
            "allow at least that, twice that to fetch the next ones meanwhile, or leave --local-cache out"
        )
