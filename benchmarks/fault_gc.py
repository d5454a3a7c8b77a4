"""``cache gc --yes`` at random moments beside a capture, and behind killed ones: the cache becomes the undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from benchmarks.fault_jobs import (
    Events,
    Job,
    capture_job,
    capture_request,
    forked,
    fresh,
    killed_after,
    mixture,
    one_line,
    run_main,
    tree,
    wait,
)
from benchmarks.fault_kills import ended, teacher_name, undisturbed

STALE = 0.25
"""Share of races before which a capture was killed: what it left is garbage."""


def gc_races(events: Events, work: Path, teacher: str, count: int, seed: int) -> dict[str, Any]:
    section, data = f"gc-race {teacher_name(teacher)}", mixture(work)
    once = capture_job(capture_request(teacher, data, work / "uncollected"))
    seconds, goal = undisturbed(once), tree(once.out)
    job = capture_job(capture_request(teacher, data, work / "collected"))
    while len(events.of(section)) < count:
        rng = random.Random(f"{seed} {len(events.of(section))}")
        fresh(job.out)
        stale = rng.random() < STALE
        if stale:
            killed_after(job, rng.uniform(0.2, 0.9) * seconds)
        events.add(section, stale=stale, **race(job, goal, work, seconds, rng))
    found = events.of(section)
    asked = [one for event in found for one in event["gc"]]
    return {
        "captures": len(found),
        "behind a killed one": sum(one["stale"] for one in found),
        "gc beside them": len(asked),
        "of these refused, in one line": sum(one["status"] != 0 and one["clear"] for one in asked),
        "of these ended otherwise badly": sum(one["status"] != 0 and not one["clear"] for one in asked),
        "captures that ended well": sum(one["status"] == 0 for one in found),
        "complete and byte-identical": sum(one["same"] for one in found),
        "said to be done, and were not": sum(one["status"] == 0 and not one["same"] for one in found),
    }


def race(job: Job, goal: dict[str, bytes], work: Path, seconds: float, rng: random.Random) -> dict[str, Any]:
    """One capture with gc beside it, one after the other, until it ends."""
    child, asked = forked(job.run, work / "collected.log"), []
    log = work / "gc.log"
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(rng.uniform(0, seconds / 3))
        status = wait(forked(lambda: run_main(["cache", "gc", str(job.out), "--yes"]), log))
        line, clear = one_line(log)
        asked.append({"status": status, "clear": clear, "line": line[:200]})
        if status == -signal.SIGKILL:
            break
    status = wait(child)
    said = (work / "collected.log").read_text()[-500:] if status else ""
    return {"gc": asked, "said": said, **finished(job, goal, status)}


def finished(job: Job, goal: dict[str, bytes], status: int) -> dict[str, Any]:
    try:
        return ended(job, goal, status)
    except Exception as error:  # a cache that cannot even be looked at
        return {"same": False, "status": status, "problems": [f"{type(error).__name__}: {error}"], "garbage": 0}
