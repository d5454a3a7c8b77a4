"""A few of each fault, by the tiny models: what the benchmark counts is counted, and everything survives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FEW = {
    "capture-kills": 3,
    "training-kills": 1,
    "flips": 12,
    "truncations": 6,
    "full-disks": 1,
    "races": 1,
    "run-damages": 2,
    "run-races": 1,
}


def test_a_few_of_each(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> None:
    sections = "capture-kills,training-kills,bit-flips,disk-full,two-jobs,training-damage,two-trainings"
    flags = [word for name, count in FEW.items() for word in (f"--{name}", str(count))]
    command = [sys.executable, "-m", "benchmarks.faults", "--work", str(tmp_path), "--only", sections, *flags]
    command += ["--teacher", str(tiny_teacher), "--student", str(tiny_student)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])["sections"]
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
    runs, races = found["training-damage"], found["two-trainings"]
    assert runs["damages"] == 2 == runs["ended with the same weights"] + runs["refused in one line"]
    assert runs["trained on in silence"] == 0
    assert (
        races["races"]
        == 1
        == races["one run, wholly one of the two"]
        == races["the other told who holds it, or what is there"]
    )
