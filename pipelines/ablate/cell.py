"""One student of a grid in a process of its own: ``python -P -m pipelines.ablate.cell CELL/request.json``.

Trains what no earlier cell has trained, asks what was not asked yet, and writes ``cell.json`` last.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipelines.quiet_threads  # noqa: F401 (before torch)

# isort: split
from pipelines.ablate.cells import CARD, shared_folder
from pipelines.ablate.grid import EvalFile
from pipelines.evaluate import evaluate_folder, figures
from pipelines.exporting.provenance import trained_template
from pipelines.progress import quiet_library_bars
from pipelines.report.runs import read_runs
from pipelines.settings import Settings, build
from pipelines.train_student import train
from student_train.config import StageSettings, TrainSettings
from student_train.whole import is_whole
from teacher_cache import stopping
from teacher_cache.errors import KdcliError, one_line

LAST_STEPS = 10
"""A stage's final loss is the mean over so many of its last logged steps."""


def run_cell(folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Train, evaluate, write ``scores.json`` and ``cell.json``; the card."""
    started = time.perf_counter()
    card_path = folder / CARD
    known = json.loads(card_path.read_text())["results"] if card_path.is_file() else {}
    wanted = {one["label"]: one for one in request["evaluations"]}
    results = {label: one for label, one in known.items() if label in wanted and one["key"] == wanted[label]["key"]}
    model = folder / request["stage_folders"][-1]["name"] / "model"
    if not card_path.is_file() or (len(results) < len(wanted) and not is_whole(model.parent)):
        link_stages(folder, request["stage_folders"])
        with ExitStack() as locks:
            claim([shared_folder(folder, one["shared"]) for one in request["stage_folders"]], locks)
            train_cell(folder, request)
    trained = time.perf_counter()
    for label, one in wanted.items():
        if label not in results:
            print(f"evaluating: {label}", flush=True)
            trusted = request["settings"]["train"]["trust_remote_code"]
            results[label] = {"key": one["key"], "scores": ask(model, one, trusted)}
    card = {
        **{name: request[name] for name in ("row", "seed", "cache", "method", "preset", "stages", "knobs")},
        "stage_folders": request["stage_folders"],
        "results": {label: results[label] for label in wanted},
        "losses": final_losses(folder),
        "seconds": {"train": round(trained - started, 1), "evaluate": round(time.perf_counter() - trained, 1)},
    }
    write_scores(folder, card)
    write_json(card_path, card)
    return card


def claim(stages: Sequence[Path], locks: ExitStack) -> None:
    """Keep every stage that is to be trained for this process alone; whoever waited finds it done.

    A finished stage whose model was removed to save space, or is damaged, is trained again, and so are those after it: they belong to
    its weights.
    """
    lost = False
    for stage in stages:
        stage.mkdir(parents=True, exist_ok=True)
        lock = locks.enter_context((stage / ".lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # it ends with the file, and the file with the process
        done = (stage / "done.json").is_file()
        lost = lost or (done and not is_whole(stage))
        if lost:
            (stage / "done.json").unlink(missing_ok=True)
            for name in ("model", "checkpoints"):
                shutil.rmtree(stage / name, ignore_errors=True)
        elif done:
            lock.close()


def link_stages(folder: Path, stages: Sequence[Mapping[str, str]]) -> None:
    """``CELL/01-PT`` → ``OUT/stages/PT-KEY``, so that a cell looks like any run of ``train-student``."""
    for stage in stages:
        link = folder / stage["name"]
        target = os.path.relpath(shared_folder(folder, stage["shared"]), folder)
        if link.is_symlink() and os.readlink(link) == target:
            continue
        if link.is_symlink() or link.exists():
            raise KdcliError(f"{link} is not this cell's stage: remove it, or choose another --out")
        link.symlink_to(target, target_is_directory=True)


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


def ask(model: Path, evaluation: Mapping[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    """Scores of the trained model on one held-out file, without the single answers."""
    file = EvalFile(**evaluation["file"])
    spec = replace(file, template=file.template or trained_template(str(model))).spec
    return figures(evaluate_folder(str(model), spec, **evaluation["options"], trust_remote_code=trust_remote_code))


def final_losses(folder: Path) -> dict[str, dict[str, float]]:
    """Stage → term → mean over its last logged steps."""
    (run,) = read_runs([folder])
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
        write_json(folder / "scores.json", scores)


def write_json(path: Path, body: Any) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(body, indent=1) + "\n")
    os.replace(draft, path)


def main(arguments: Sequence[str]) -> int:
    quiet_library_bars()  # a log's last line is to be the error
    path = Path(arguments[0])
    try:
        with stopping.listening():
            run_cell(path.parent, json.loads(path.read_text()))
    except KdcliError as error:
        print(f"Error: {one_line(error)}", flush=True)
        return 1
    except stopping.Stopped as stop:
        print(one_line(stop), flush=True)
        return stop.status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
