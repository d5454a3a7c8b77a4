"""A capture of two workers, its command or one of them killed: what outlives it, what lies about, and what the same command makes of it."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.fault_jobs import (
    Events,
    Job,
    capture_flags,
    capture_request,
    forked,
    fresh,
    mixture,
    one_line,
    run_main,
    tree,
    wait,
    write_config,
)
from benchmarks.fault_kills import ended, teacher_name, undisturbed

BY = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What the command gets; SIGKILL is what a worker gets."""
TO_WORKER = 0.2
"""Share of kills that hit a worker."""
GONE_SECONDS = 30.0
"""Within so many everything that a killed command started must have ended."""
HANGS = 120.0
"""Seconds after which a command that does not end is taken for one that never will."""


def family(command: int, mark: str) -> dict[int, str]:
    """Process number → command line of what the command started and what still runs, itself left out.

    It is in the command's session, or has its mark in the environment, wherever it has put itself.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            marked = mark.encode() in (entry / "environ").read_bytes()
            if entry.name != str(command) and state not in "ZX" and (marked or session == str(command)):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:160]
        except (OSError, ValueError):
            continue
    return found


def alone(run: Callable[[], None], mark: str) -> None:
    """In a new child: a session of its own, signals as a terminal leaves them, semaphores with a name to be found by."""
    os.setsid()
    os.environ["KDCLI_FAULTS"] = mark
    multiprocessing.current_process()._config["semprefix"] = f"/{mark}"  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    run()


def over(child: int, seconds: float) -> bool:
    """Whether it ends in so many."""
    deadline = time.monotonic() + seconds
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def killed(job: Job, log: Path, seconds: float, rng: random.Random) -> dict[str, Any] | int:
    """What was seen of a run that was killed; its exit status where it ended before."""
    mark = f"faults-{uuid.uuid4().hex[:12]}"
    child = forked(lambda: alone(job.run, mark), log)
    if rng.random() < 0.5:  # not before there are workers: the first further process keeps count of semaphores
        while len(family(child, mark)) < 2 and not over(child, 0.02):
            pass
    if over(child, rng.uniform(0, seconds)):
        return wait(child)
    workers = [number for number, line in family(child, mark).items() if "spawn_main" in line]
    hits = bool(workers) and rng.random() < TO_WORKER
    number = signal.SIGKILL if hits else rng.choice(BY)
    os.kill(rng.choice(workers) if hits else child, number)
    hung = not over(child, HANGS)
    if hung:
        os.kill(child, signal.SIGKILL)
    status, began = wait(child), time.monotonic()
    while (left := family(child, mark)) and time.monotonic() - began < GONE_SECONDS:
        time.sleep(0.05)
    seconds = time.monotonic() - began
    drafts = [one.name for one in (job.out / ".staging").glob("*")]
    shared = [name for name in os.listdir("/dev/shm") if mark in name]
    for one in left:
        os.kill(one, signal.SIGKILL)
    line, clear = one_line(log)
    told = status == 0 or (clear and line.startswith("Error: worker "))
    seen = {"workers": len(workers), "hung": hung, "left": list(left.values()), "seconds": round(seconds, 2)}
    seen |= {"tars": [name for name in drafts if name.endswith(".tar")], "drafts": len(drafts), "shared memory": shared}
    return {
        "of": "a worker" if hits else f"the command by {number.name}",
        "status": status,
        "told": told,
        "line": line,
    } | seen


def parent_kills(events: Events, work: Path, teacher: str, count: int, seed: int) -> dict[str, Any]:
    """Kills of one capture after another, each cache compared with the undisturbed one when it is done."""
    section, data = f"parent-kills {teacher_name(teacher)}", mixture(work)
    config = write_config(work / "kd.toml")

    def command(out: Path) -> Job:
        flags = capture_flags(capture_request(teacher, data, out, workers=2))
        return Job(out, lambda: run_main(["cache-teacher", *flags, "--config", str(config)]))

    once, job = command(work / "by-two"), command(work / "orphaned")
    seconds, goal = undisturbed(once), tree(once.out)
    fresh(job.out)
    while sum(event["event"] == "kill" for event in events.of(section)) < count:
        seen = killed(job, work / "orphaned.log", seconds, random.Random(f"{seed} {len(events.of(section))}"))
        if isinstance(seen, int):
            events.add(section, event="end", **ended(job, goal, seen))
            fresh(job.out)
        else:
            events.add(section, event="kill", **seen)
    if events.of(section)[-1]["event"] == "kill":
        events.add(section, event="end", **ended(job, goal, wait(forked(job.run, work / "orphaned.log"))))
    return {"seconds undisturbed": round(seconds, 2), **summary(events.of(section))}


def summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    kills = [one for one in events if one["event"] == "kill"]
    ends = [one for one in events if one["event"] == "end"]
    workers = [one for one in kills if one["of"] == "a worker"]
    return {
        "kills": len(kills),
        "of": dict(Counter(one["of"] for one in kills)),
        "while workers ran": sum(one["workers"] > 0 for one in kills),
        "commands that hung": sum(one["hung"] for one in kills),
        "left something running": sum(bool(one["left"]) for one in kills),
        "seconds until all was gone, most": max((one["seconds"] for one in kills), default=0.0),
        "left something in shared memory": sum(bool(one["shared memory"]) for one in kills),
        "left a tar in staging, the command killed": sum(bool(one["tars"]) for one in kills if one not in workers),
        "left a tar in staging, a worker killed": sum(bool(one["tars"]) for one in workers),
        "killed workers told in one line": sum(one["told"] for one in workers),
        "caches finished": len(ends),
        "of them byte-identical": sum(one["same"] for one in ends),
    }
