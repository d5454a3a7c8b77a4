"""A disk that is full, two jobs at once into one folder, a node that leaves a Ray cluster, a store whose requests fail."""

from __future__ import annotations

import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.fault_jobs import (
    Events,
    Job,
    capture_flags,
    capture_job,
    capture_request,
    forked,
    fresh,
    mixture,
    one_line,
    run_main,
    training_command,
    tree,
    wait,
    write_config,
)
from benchmarks.fault_kills import ended, trained, undisturbed
from pipelines.inspect.cache import survey
from teacher_cache.errors import KdcliError

ROOT = Path(__file__).parent.parent
TESTS = {
    "ray-node": "tests/pipelines/capture/executors/test_ray.py::test_a_node_that_goes_away",
    "s3": "tests/pipelines/test_object_store.py::test_every_fifth_request_fails",
}
ENOUGH = 1 << 30
FULL = ("No space left", "File too large")
"""What the system says of a full disk, and of a file beyond its limit."""


class Disk:
    """A disk of a size: a file system in memory where this user may mount one, else a limit on the size of every file."""

    def __init__(self, folder: Path):
        fresh(folder).mkdir(parents=True)
        self.folder, self.limit = folder, 0
        self.mounted = self._mount("size=64k")
        self.kind = "tmpfs" if self.mounted else "RLIMIT_FSIZE"

    def _mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False

    def resize(self, size: int) -> None:
        if self.mounted:
            self._mount(f"remount,size={size}")
        else:
            self.limit = size

    def run(self, command: list[str], log: Path) -> int:
        """A ``kdcli`` command on this disk."""

        def run() -> None:
            if not self.mounted:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails instead
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))
            run_main(command)

        return wait(forked(run, log))

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=True)


def disk_full(
    events: Events, work: Path, models: tuple[str, str], cache: Callable[[], Path], points: int, seed: int
) -> dict[str, Any]:
    """Capture and training run out of room at ``points`` moments each; then there is room, and the same command is given again."""
    section, made, goal = "disk-full", cache(), tree(cache())
    rng = random.Random(f"{seed} {len(events.of(section))}")
    config = write_config(work / "kd.toml")
    teacher, student = models
    train = training_command(student, made)
    quiet = Job(work / "trained-quietly", lambda: run_main(train(work / "trained-quietly", config)))
    undisturbed(quiet)
    disk = Disk(work / "disk")
    try:
        for job in ("capture", "training"):
            size = used(made if job == "capture" else quiet.out) if disk.mounted else largest(made, quiet.out, job)
            for _ in range(points - sum(event["job"] == job for event in events.of(section))):
                clear(disk)
                out = disk.folder / job
                flags = capture_flags(capture_request(teacher, mixture(work), out))
                command = ["cache-teacher", *flags, "--config", str(config)] if job == "capture" else train(out, config)
                room = int(rng.uniform(0.02, 0.95) * size)
                disk.resize(max(room, 1 << 14))
                status = disk.run(command, work / "full.log")
                first = {"room": room, "status": status, **said(work / "full.log")}
                first["drafts"] = len(list(out.rglob(".staging/*")))
                first["half committed"] = [] if job == "training" else half_committed(out)
                disk.resize(ENOUGH)
                again = disk.run(command, work / "room.log")
                same = trained(out) == trained(quiet.out) if job == "training" else captured(out, goal, again)
                events.add(section, job=job, disk=disk.kind, again=again, same=same, **first)
    finally:
        disk.close()
    found = [one for one in events.of(section) if one["status"] != 0]
    return {
        "disk": disk.kind,
        "ran out of room": {job: sum(one["job"] == job for one in found) for job in ("capture", "training")},
        "one clear line": sum(one["clear"] for one in found),
        "nothing half committed": sum(not one["half committed"] for one in found),
        "drafts left behind": sum(one["drafts"] for one in found),
        "the same bytes once there was room": sum(one["same"] for one in found),
        "lines": sorted({re.sub(r"\S*/\S*", "…", one["line"])[:160] for one in found}),
    }


def used(folder: Path) -> int:
    """Bytes that a folder takes in pages."""
    return sum(4096 * -(-file.stat().st_size // 4096) for file in folder.rglob("*") if file.is_file())


def largest(cache: Path, trained_in: Path, job: str) -> int:
    return max(file.stat().st_size for file in (cache if job == "capture" else trained_in).rglob("*") if file.is_file())


def clear(disk: Disk) -> None:
    disk.resize(ENOUGH)
    for one in disk.folder.iterdir():
        shutil.rmtree(one)


def said(log: Path) -> dict[str, Any]:
    """The error that a user sees, and whether it is one line of ours that says what is wrong."""
    line, alone = one_line(log)
    return {"clear": alone and any(words in line for words in FULL), "line": line}


def half_committed(out: Path) -> list[str]:
    """What verify finds besides shards that are not there yet."""
    try:
        return [str(one) for one in survey(str(out))[1] if one.shard is None or "not captured yet" not in one.what]
    except KdcliError:
        return []  # no cache yet


def captured(out: Path, goal: dict[str, bytes], status: int) -> bool:
    return bool(ended(Job(out, lambda: None), goal, status)["same"])


def two_jobs(
    events: Events, work: Path, teacher: str, cache: Callable[[], Path], races: int, seed: int
) -> dict[str, Any]:
    """Two captures into one folder, the second begun a random while after the first."""
    section, goal = "two-jobs", tree(cache())
    job = capture_job(capture_request(teacher, mixture(work), work / "raced"))
    seconds = undisturbed(job)
    rng = random.Random(f"{seed} {len(events.of(section))}")
    while len(events.of(section)) < races:
        fresh(job.out)
        first = forked(job.run, work / "first.log")
        time.sleep(rng.choice([0.0, rng.uniform(0, seconds / 2)]))
        second = forked(job.run, work / "second.log")
        statuses = [wait(first), wait(second)]
        told = [log.read_text()[-500:] for log, s in zip((work / "first.log", work / "second.log"), statuses) if s]
        events.add(section, statuses=statuses, said=told, **ended(job, goal, max(statuses)))
    found = events.of(section)
    return {
        "races": len(found),
        "both ended well": sum(one["statuses"] == [0, 0] for one in found),
        "one good cache, byte-identical": sum(one["same"] for one in found),
        "files of a second writer that gc removed, mean": round(
            sum(one["garbage"] for one in found) / max(1, len(found)), 1
        ),
    }


def tested(section: str) -> dict[str, Any]:
    """A fault that the test suite makes: its test is run, and its outcome told."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS[section]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return {
        "test": TESTS[section],
        "outcome": lines[-1] if lines else done.stderr[-200:],
        "passed": done.returncode == 0,
    }
