"""Faults, counted: kills, flipped bits, cut files, full disks, two jobs at once; and what of the work survives them.

    python -m benchmarks.faults --work runs/faults --save
    python -m benchmarks.faults --work runs/faults --only capture-kills --capture-kills 150 --teacher null:pipelines/demo/assets/teacher

Every event is a line in WORK/events.jsonl, so a long count may be stopped; the same command goes on. Needs no quiet machine: these are
counts, not times.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pipelines.processes.quiet_threads  # noqa: F401 (before torch)

# isort: split
import torch

from benchmarks.common import finish, machine, print_table
from benchmarks.fault_damage import damages
from benchmarks.fault_gc import gc_races
from benchmarks.fault_jobs import Events, capture_job, capture_request, mixture
from benchmarks.fault_kills import capture_kills, teacher_name, training_kills, undisturbed
from benchmarks.fault_parents import parent_kills
from benchmarks.fault_storage import disk_full, tested, two_jobs
from benchmarks.fault_trainings import two_trainings, weights
from pipelines.demo.run import STUDENT_START, TEACHER

SECTIONS = ("capture-kills", "training-kills", "bit-flips", "disk-full", "two-jobs", "ray-node", "s3")
SECTIONS += ("parent-kills", "two-trainings", "weights", "gc-race")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, required=True, help="folder of scratch caches and of events.jsonl")
    made.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated; bit-flips cuts files too")
    made.add_argument("--teacher", default=str(TEACHER), help="of the captures")
    made.add_argument("--student", default=str(STUDENT_START), help="of the trainings")
    made.add_argument("--capture-kills", type=int, default=50)
    made.add_argument("--training-kills", type=int, default=50)
    made.add_argument("--flips", type=int, default=1000)
    made.add_argument("--truncations", type=int, default=200)
    made.add_argument("--full-disks", type=int, default=10, help="of capture, and as many of training")
    made.add_argument("--races", type=int, default=10)
    made.add_argument("--parent-kills", type=int, default=50, help="of a capture by two workers, or of one of these")
    made.add_argument("--two-trainings", type=int, default=50)
    made.add_argument(
        "--weights", type=int, default=50, help="damages inside a training, and as many of a finished one"
    )
    made.add_argument("--gc-races", type=int, default=50)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--save", action="store_true", help="write benchmarks/results/faults-<machine>.json")
    return made


def run_sections(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Section → what was counted."""
    work, events = given.work.resolve(), Events(given.work.resolve())
    data, teacher, student, seed = mixture(work), given.teacher, given.student, given.seed

    @cache
    def whole_cache() -> Path:
        """Undisturbed: what the others are compared with, and what is trained from."""
        job = capture_job(capture_request(teacher, data, work / "whole"))
        undisturbed(job)
        return job.out

    request = capture_request(teacher, data, work / "damaged")
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "capture-kills": lambda: capture_kills(events, work, teacher, given.capture_kills, seed),
        "training-kills": lambda: training_kills(events, work, whole_cache, student, given.training_kills, seed),
        "bit-flips": lambda: damages(events, work, whole_cache, request, given.flips, given.truncations, seed),
        "disk-full": lambda: disk_full(events, work, (teacher, student), whole_cache, given.full_disks, seed),
        "two-jobs": lambda: two_jobs(events, work, teacher, whole_cache, given.races, seed),
        "ray-node": lambda: tested("ray-node"),
        "s3": lambda: tested("s3"),
        "parent-kills": lambda: parent_kills(events, work, teacher, given.parent_kills, seed),
        "two-trainings": lambda: two_trainings(events, work, whole_cache, student, given.two_trainings, seed),
        "weights": lambda: weights(events, work, whole_cache, student, given.weights, seed),
        "gc-race": lambda: gc_races(events, work, teacher, given.gc_races, seed),
    }
    chosen = given.only.split(",")
    if unknown := sorted(set(chosen) - set(run)):
        raise SystemExit(f"--only: no section {', '.join(unknown)}; there are {', '.join(run)}")
    found = {}
    for name in chosen:
        found[name] = run[name]()
        print_table([name, ""], [[key, shown(value)] for key, value in found[name].items()])
        print(flush=True)
    return found


def shown(value: Any) -> str:
    return ", ".join(f"{key} {one}" for key, one in value.items()) if isinstance(value, dict) else str(value)


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    torch.set_num_threads(1)
    found = run_sections(given)
    shapes = teacher_name(given.teacher) + ("" if given.only == ",".join(SECTIONS) else f" {given.only}")
    finish("faults", {"machine": machine("cpu"), "shapes": shapes, "sections": found}, given.save)


if __name__ == "__main__":
    main()
