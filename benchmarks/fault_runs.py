"""Damaged files of training runs, and two trainings in one folder: what is silent, what is told, what comes of it."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.fault_damage import damaged
from benchmarks.fault_jobs import Events, Job, forked, fresh, training_settings, tree, wait
from benchmarks.fault_kills import trained, undisturbed
from pipelines.train_student import train
from teacher_cache.errors import KdcliError, one_line

KINDS = {
    "weights of a checkpoint": "01-DFT/checkpoints/step-*/*.safetensors",
    "state.json": "01-DFT/checkpoints/step-*/state.json",
    "final weights": "01-DFT/model/*.safetensors",
    "files beside them": "01-DFT/model/*.json",
    "done.json": "01-DFT/done.json",
    "run.json": "run.json",
}
HOW = ("flipped", "cut", "gone")


def spoken_job(cache: Path, out: Path, student: str, seed: int = 0) -> Job:
    """A training that prints its notes, and what it refuses as one line."""
    settings = training_settings(out, student)
    settings = replace(settings, train=replace(settings.train, seed=seed))

    def run() -> None:
        try:
            train(str(cache), "llava-kd", settings, "DFT", say=lambda text: print(text, flush=True))
        except KdcliError as error:
            print(f"Error: {one_line(error)}", flush=True)
            raise SystemExit(1) from None

    return Job(out, run)


def run_damages(
    events: Events, work: Path, cache: Callable[[], Path], student: str, count: int, seed: int
) -> dict[str, Any]:
    """One file of a finished run, or of one that was killed before its end, is damaged; then the same command runs again."""
    section, made, whole, out = "training-damage", cache(), work / "run-whole", work / "run-damaged"
    undisturbed(spoken_job(made, whole, student))
    goal, model = trained(whole), tree(whole / "01-DFT" / "model")
    while len(events.of(section)) < count:
        number = len(events.of(section))
        rng = random.Random(f"{seed} {number}")
        shutil.copytree(whole, fresh(out))
        is_open = number % 2 == 1
        if is_open:
            (out / "01-DFT" / "done.json").unlink()
            shutil.rmtree(out / "01-DFT" / "model")
        kinds = [kind for kind, pattern in KINDS.items() if list(out.glob(pattern))]
        kind, how = kinds[number // 2 % len(kinds)], rng.choice(HOW)
        file = rng.choice(sorted(out.glob(KINDS[kind])))
        if how == "gone":
            file.unlink()
        else:
            file.write_bytes(damaged(file.read_bytes(), how == "cut", rng)[0])
        log = work / "run-damaged.log"
        status = wait(forked(spoken_job(made, out, student).run, log))
        said = log.read_text()
        same = status == 0 and trained(out) == goal and tree(out / "01-DFT" / "model") == model
        refused = status == 1 and said.splitlines()[-1].startswith("Error: ") and "Traceback" not in said
        event = {"kind": kind, "how": how, "open": is_open, "same": same, "refused": refused, "told": file.name in said}
        events.add(section, event="damage", **event, what=f"{file.relative_to(out)} {said[-500:]}")
    found = events.of(section)
    return {
        "damages": len(found),
        "of kind": dict(Counter(one["kind"] for one in found)),
        "ended with the same weights": sum(one["same"] for one in found),
        "refused in one line": sum(one["refused"] for one in found),
        "trained on in silence": sum(not one["same"] and not one["refused"] for one in found),
    }


def two_trainings(
    events: Events, work: Path, cache: Callable[[], Path], student: str, count: int, seed: int
) -> dict[str, Any]:
    """Two trainings with other seeds begin in one folder at nearly the same time."""
    section, made, out = "two-trainings", cache(), work / "run-shared"
    goals = []
    for number in (0, 1):
        job = spoken_job(made, work / f"run-seed-{number}", student, number)
        undisturbed(job)
        goals.append(trained(job.out))
    while len(events.of(section)) < count:
        rng = random.Random(f"{seed} {len(events.of(section))}")
        fresh(out)
        logs = [work / f"run-shared-{number}.log" for number in (0, 1)]
        order = rng.sample((0, 1), 2)
        children = {number: forked(spoken_job(made, out, student, number).run, logs[number]) for number in order}
        statuses = {number: wait(child) for number, child in children.items()}
        winners = [number for number, status in statuses.items() if status == 0]
        good = len(winners) == 1 and trained(out) == goals[winners[0]]
        lines = logs[1 - winners[0]].read_text().splitlines() if len(winners) == 1 else []
        named = bool(lines) and ("writes there" in lines[-1] or "another finished stage" in lines[-1])
        events.add(section, event="race", good=good, named=named, statuses=[statuses[0], statuses[1]])
    found = events.of(section)
    return {
        "races": len(found),
        "one run, wholly one of the two": sum(one["good"] for one in found),
        "the other told who holds it, or what is there": sum(one["named"] for one in found),
    }
