"""A few of each fault, by the tiny models: what the benchmark counts is counted, and everything survives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FEW = {"capture-kills": 3, "training-kills": 1, "flips": 12, "truncations": 6, "full-disks": 1, "races": 1}
FEW |= {"parent-kills": 2, "two-trainings": 2, "weights": 4, "gc-races": 1}


def counted(teacher: Path, student: Path, work: Path, sections: str) -> dict[str, Any]:
    """Section → what the benchmark counted."""
    flags = [word for name, count in FEW.items() for word in (f"--{name}", str(count))]
    command = [sys.executable, "-m", "benchmarks.faults", "--work", str(work), "--only", sections, *flags]
    command += ["--teacher", str(teacher), "--student", str(student)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])["sections"]


def test_a_few_of_those_that_others_suffer(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> None:
    found = counted(tiny_teacher, tiny_student, tmp_path, "parent-kills,two-trainings,weights,gc-race")
    parents, trainings, weights, races = found.values()
    assert parents["kills"] == 2 and parents["of them byte-identical"] == parents["caches finished"] >= 1
    assert parents["commands that hung"] == parents["left something running"] == 0
    assert parents["left something in shared memory"] == parents["left a tar in staging, the command killed"] == 0
    assert trainings["races"] == 2 == trainings["the undisturbed student in the end"]
    assert trainings["rc 0 with another student"] == trainings["unclear"] == 0
    assert weights["damages"] == {"inside": 4, "finished": 4} and weights["silent"] == weights["unclear"] == 0
    assert (
        races["captures"] == 1 == races["complete and byte-identical"] and races["of these ended otherwise badly"] == 0
    )


def test_a_few_of_each(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> None:
    found = counted(tiny_teacher, tiny_student, tmp_path, "capture-kills,training-kills,bit-flips,disk-full,two-jobs")
    captures, trainings, damage = (found[name] for name in ("capture-kills", "training-kills", "bit-flips"))
    assert captures["kills"] == 3 and captures["of them byte-identical"] == captures["caches finished"] >= 1
    assert captures["committed files touched by a resume"] == 0 and captures["shards half done at a kill, most"] <= 1
    assert (
        trainings["kills"] == 1 and trainings["of them with the same weights and losses"] == trainings["runs finished"]
    )
    assert (damage["flips"], damage["truncations"]) == (12, 6)
    assert damage["named by verify"] == 18 == damage["detected by verify"]
    assert damage["byte-identical after repair"] == damage["nothing else touched"] == damage["repairs"] >= 1
    assert found["two-jobs"]["one good cache, byte-identical"] == found["two-jobs"]["both ended well"] == 1
    full = found["disk-full"]
    assert full["ran out of room"] == {"capture": 1, "training": 1} and full["drafts left behind"] == 0
    assert full["one clear line"] == full["nothing half committed"] == full["the same bytes once there was room"] == 2
