"""One student of a grid in a process of its own: ``python -P -m pipelines.ablate.cell CELL/request.json``.

Trains what no earlier cell has trained, asks what was not asked yet, and writes ``cell.json`` last.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipelines.processes.quiet_threads  # noqa: F401 (before torch)

# isort: split
from pipelines.ablate.cards import CARD, read_card
from pipelines.ablate.cells import shared_folder
from pipelines.ablate.grid import EvalFile
from pipelines.command_line.output import give_up_stdout
from pipelines.export.provenance import trained_template
from pipelines.judge.evaluation.kept import SUFFIX, KeepIn
from pipelines.judge.evaluation.run import evaluate_folder, figures
from pipelines.processes.spawned import end_with_starter
from pipelines.report.runs import read_runs
from pipelines.settings import Settings, build
from pipelines.terminal.progress import quiet_library_bars
from pipelines.train.output_lock import Held, alone
from pipelines.train.run_records import fits, read_record, write_record
from pipelines.train.train_student import train
from student_train.config import StageSettings, TrainSettings
from student_train.whole import DONE_FILE, finished_damage, read_done
from teacher_cache import stopping
from teacher_cache.errors import KdcliError, is_of_disk, one_line

DISK = 75
"""Exit status (sysexits' "try again") of a cell whose disk took no more: no failure of its own."""
WHAT, CHOOSE = "kdcli ablate", "--out"
"""In the line that whoever comes second gets (``output_lock``)."""
ASKED = "evaluating"
"""First word of the log's line on a held-out file, which the ablation's bar repeats."""
GONE = "no model"
WAIT_SECONDS = 0.5
LAST_STEPS = 10
"""A stage's final loss is the mean over so many of its last logged steps."""


def run_cell(folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Train, evaluate, write ``scores.json`` and ``cell.json``; the card."""
    started = time.perf_counter()
    there, wrong = read_card(folder)
    if wrong:
        print(f"note: {wrong}", flush=True)
    known = there.get("results", {})
    wanted = {one["label"]: one for one in request["evaluations"]}
    results = {label: one for label, one in known.items() if label in wanted and one["key"] == wanted[label]["key"]}
    last = folder / request["stage_folders"][-1]["name"]
    if not there or (len(results) < len(wanted) and not is_whole(last)):
        link_stages(folder, request["stage_folders"])
        with ExitStack() as locks:
            claim([shared_folder(folder, one["shared"]) for one in request["stage_folders"]], locks)
            train_cell(folder, request)
    trained = time.perf_counter()

    def keep() -> dict[str, Any]:
        card = {
            **{name: request[name] for name in ("row", "seed", "cache", "method", "preset", "stages", "knobs")},
            "stage_folders": request["stage_folders"],
            "results": {label: results[label] for label in wanted if label in results},
            "losses": final_losses(folder),
            "seconds": {"train": round(trained - started, 1), "evaluate": round(time.perf_counter() - trained, 1)},
        }
        write_scores(folder, card)
        write_record(folder / CARD, card)
        return card

    card = keep()
    for label, one in wanted.items():
        if label not in results:
            print(f"{ASKED}: {label}", flush=True)
            trusted = request["settings"]["train"]["trust_remote_code"]
            kept_in = KeepIn(folder / f".answers-{one['key'][:8]}{SUFFIX}", anew=True)
            results[label] = {"key": one["key"], "scores": ask(last / "model", one, trusted, kept_in)}
            card = keep()  # what was asked is not asked again, whatever happens to the rest
            kept_in.path.unlink(missing_ok=True)
    return card


def claim(stages: Sequence[Path], locks: ExitStack) -> None:
    """Keep every stage that is to be trained for this process alone; whoever waited finds it done.

    A finished stage whose model was removed to save space, or that is damaged, is trained again, and so are those after it: they belong
    to its weights. A whole one needs no lock: who trained it goes on with its own next stage, and holds the lock until that ends.
    """
    lost = False
    for stage in stages:
        if not lost and os.path.lexists(stage / DONE_FILE) and not damage_of(stage):
            continue
        with ExitStack() as held:
            held.enter_context(waited_for(stage))
            done = os.path.lexists(stage / DONE_FILE)
            lost = lost or (done and not is_whole(stage))
            if lost:
                for name in (DONE_FILE, "model", "checkpoints"):
                    _remove(stage / name)
            if lost or not done:
                locks.enter_context(held.pop_all())


@contextmanager
def waited_for(stage: Path) -> Iterator[None]:
    """``alone`` in a stage's folder, once nobody else is; says who that is meanwhile."""
    with ExitStack() as lock:
        told = False
        while True:
            try:
                lock.enter_context(alone(stage, WHAT, CHOOSE, print))
                break
            except Held as error:
                if not told:
                    print(f"waiting: {one_line(error)}", flush=True)
                told = True
                time.sleep(WAIT_SECONDS)
        yield


def is_whole(stage: Path) -> bool:
    """Whether a finished stage's model can be started from, or asked; says what is damaged."""
    wrong = damage_of(stage)
    if wrong and wrong != GONE:
        print(f"note: {stage}: {one_line(wrong)}: the stage is trained again", flush=True)
    return not wrong


def damage_of(stage: Path) -> str:
    """ "" for a finished stage whose model is there as it was saved; ``GONE``: it was removed to save space."""
    if not (stage / "model").is_dir():
        return GONE
    try:
        return finished_damage(stage, read_done(stage))
    except (KdcliError, OSError) as error:
        return str(error)


def _remove(path: Path) -> None:
    """Whatever it is; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def link_stages(folder: Path, stages: Sequence[Mapping[str, str]]) -> None:
    """``CELL/01-PT`` → ``OUT/stages/PT-KEY``, so that a cell looks like any run of ``train-student``."""
    for stage in stages:
        link = folder / stage["name"]
        target = os.path.relpath(shared_folder(folder, stage["shared"]), folder)
        if link.is_symlink() and os.readlink(link) == target:
            continue
        if link.is_symlink() or link.exists():
            raise KdcliError(f"{link} is not this cell's stage: remove it, or choose another --out")
        try:
            link.symlink_to(target, target_is_directory=True)
        except OSError as error:
            raise KdcliError(
                f"{link}: cannot be linked to {target} ({error.strerror}): choose an --out on a disk that has symbolic links"
            ) from None


def train_cell(folder: Path, request: Mapping[str, Any]) -> None:
    """All stages; those that are done are found done. Checkpoints of finished stages go: their model is there."""
    given = request["settings"]
    settings = Settings(
        train=replace(build(TrainSettings, given["train"], "[train]"), output_dir=str(folder)),
        stages={name: build(StageSettings, table, f"[stages.{name}]") for name, table in given["stages"].items()},
        methods=given["methods"],
    )

    def on_step(stage: str, step: int, steps: int, result: Any) -> None:
        if step % 10 == 0 or step + 1 == steps:
            print(f"{stage} step {step + 1}/{steps} loss {result.loss:.4f}", flush=True)

    knobs = request["knobs"]
    train(request["cache"], request["method"], settings, request["stages"], request["preset"], knobs, on_step, print)
    for one in request["stage_folders"]:
        shutil.rmtree(shared_folder(folder, one["shared"]) / "checkpoints", ignore_errors=True)


def ask(
    model: Path, evaluation: Mapping[str, Any], trust_remote_code: bool, kept_in: KeepIn | None = None
) -> dict[str, Any]:
    """Scores of the trained model on one held-out file, without the single answers."""
    file = EvalFile(**evaluation["file"])
    spec = replace(file, template=file.template or trained_template(str(model))).spec
    how = {**evaluation["options"], "trust_remote_code": trust_remote_code, "kept_in": kept_in}
    return figures(evaluate_folder(str(model), spec, **how))


def final_losses(folder: Path) -> dict[str, dict[str, float]]:
    """Stage → term → mean over its last logged steps."""
    try:
        (run,) = read_runs([folder])
    except KdcliError as error:
        print(f"note: no final losses: {error}", flush=True)  # a student is not worth less for that
        return {}
    found = {}
    for number, stage in enumerate(run.stages, start=1):
        last = stage.points[-LAST_STEPS:]
        found[f"{number:02d}-{stage.name}"] = {
            term: sum(point[term] for point in last) / len(last) for term in stage.terms if all(term in p for p in last)
        }
    return found


def write_scores(folder: Path, card: Mapping[str, Any]) -> None:
    """``scores.json``, where ``kdcli report`` looks: the row's name, with the evaluation where there are several."""
    several = len(card["results"]) > 1
    scores = {
        f"{card['row']}: {label}" if several else card["row"]: one["scores"] for label, one in card["results"].items()
    }
    if scores:
        write_record(folder / "scores.json", scores)


def main(arguments: Sequence[str]) -> int:
    quiet_library_bars()  # a log's last line is to be the error
    path = Path(arguments[0])
    try:
        with stopping.listening():
            end_with_starter()
            run_cell(path.parent, read_record(path, fits({}), "run `kdcli ablate`, which writes it"))
    except (KdcliError, OSError) as error:
        last_word(f"Error: {one_line(error)}")
        return DISK if is_of_disk(error) else 1
    except stopping.Stopped as stop:
        last_word(one_line(stop))
        return stop.status
    return 0


def last_word(text: str) -> None:
    """Into the log, which may lie on the disk that is full."""
    try:
        print(text, flush=True)
    except OSError:
        give_up_stdout()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
