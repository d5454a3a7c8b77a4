"""Two trainings in one folder, and damaged files of a training: refused by name, mended, or told; never another student without a word."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.fault_jobs import (
    Events,
    Job,
    forked,
    fresh,
    killed_after,
    one_line,
    run_main,
    training_command,
    wait,
    write_config,
)
from benchmarks.fault_kills import trained, undisturbed

OTHER = ["--seed", "7"]
"""What the second of two trainings is told besides, in every other race."""
KILLED_EVERY = 3
"""Races between kills of the one that trains."""
HOWS = ("bit", "cut", "deleted", "emptied")


def commands(work: Path, student: str, cache: Path, stages: str) -> Callable[..., Job]:
    """(folder, further flags) → a job."""
    config, line = write_config(work / "kd.toml"), training_command(student, cache, stages)

    def job(out: Path, *more: str) -> Job:
        return Job(out, lambda: run_main([*line(out, config), *more]))

    return job


# ---- two at once


def two_trainings(
    events: Events, work: Path, cache: Callable[[], Path], student: str, count: int, seed: int
) -> dict[str, Any]:
    """The second begins a random while after the first; every third time the first is killed some time later."""
    section, job = "two-trainings", commands(work, student, cache(), "DFT")
    quiet = {more: job(work / f"quiet-{len(more)}", *more) for more in ((), tuple(OTHER))}
    seconds = [undisturbed(one) for one in quiet.values()]
    goals = {more: trained(one.out) for more, one in quiet.items()}
    out = work / "contested"
    while (number := len(events.of(section))) < count:
        rng = random.Random(f"{seed} {number}")
        fresh(out)
        more = tuple(OTHER) if number % 2 else ()
        kill = rng.uniform(0, seconds[0] / 2) if number % KILLED_EVERY == 0 else None
        seen = contest(job(out), job(out, *more), work, rng.uniform(0, 0.8 * seconds[0]), kill)
        events.add(section, other=bool(more), killed=kill is not None, **seen, **result(job, out, more, goals, work))
    found = events.of(section)
    refused = [one for event in found for one in event["refused"]]
    return {
        "races": len(found),
        "with other settings": sum(one["other"] for one in found),
        "the first killed": sum(one["statuses"][0] == -signal.SIGKILL for one in found),
        "both ended well": sum(one["statuses"] == [0, 0] for one in found),
        "one ended well": sum(one["statuses"].count(0) == 1 for one in found),
        "refusals": len(refused),
        "that name the holder, in one line": sum(one["holder"] for one in refused),
        "that name what stands there, in one line": sum(one["clear"] and not one["holder"] for one in refused),
        "unclear": sum(not one["clear"] for one in refused),
        "the undisturbed student in the end": sum(one["same"] for one in found),
        "rc 0 with another student": sum(one["mixed"] for one in found),
    }


def contest(first: Job, second: Job, work: Path, offset: float, kill: float | None) -> dict[str, Any]:
    logs = [work / "contest-1.log", work / "contest-2.log"]
    children = [forked(first.run, logs[0])]
    time.sleep(offset)
    children.append(forked(second.run, logs[1]))
    if kill is not None:
        time.sleep(kill)
        os.kill(children[0], signal.SIGKILL)
    statuses = [wait(child) for child in children]
    refused = []
    for number, (status, log) in enumerate(zip(statuses, logs)):
        if status not in (0, -signal.SIGKILL):
            line, clear = one_line(log)
            holder = clear and f"process {children[1 - number]}" in line
            refused.append({"which": number, "clear": clear, "holder": holder, "line": line[-400:]})
    return {"statuses": statuses, "offset": round(offset, 3), "refused": refused}


def result(job: Any, out: Path, more: tuple[str, ...], goals: dict[Any, Any], work: Path) -> dict[str, Any]:
    """Both commands again: one at least must end well, with its own student and no other's."""
    good, log = {}, work / "contest-again.log"
    for flags in dict.fromkeys([(), more]):
        if wait(forked(job(out, *flags).run, log)) == 0:
            good[flags] = trained(out) == goals[flags]
    return {"same": len(good) == 1 and all(good.values()), "mixed": not all(good.values())}


# ---- damaged files


def weights(
    events: Events, work: Path, cache: Callable[[], Path], student: str, count: int, seed: int
) -> dict[str, Any]:
    """``count`` damages of a training of two stages inside the second, and as many of a finished one; then the same command again."""
    job = commands(work, student, cache(), "DPT,DFT")(work / "damaged-run")
    undisturbed(job)
    goal = models(job.out)
    keep(job.out, work / "run-finished")
    fresh(job.out)
    killed_after(job, 0.0, lambda: len(list(job.out.glob("02-DFT/checkpoints/step-*"))) >= 3)
    keep(job.out, work / "run-inside")
    for state in ("inside", "finished"):
        section, files = f"weights {state}", whereof(work / f"run-{state}")
        while (number := len(events.of(section))) < count:
            shutil.copytree(work / f"run-{state}", fresh(job.out), symlinks=True)
            file = job.out / files[number % len(files)]
            how = HOWS[(number // len(files) + number) % len(HOWS)]
            what = damage(file, how, random.Random(f"{seed} {state} {number}"))
            status = wait(forked(job.run, work / "damaged-run.log"))
            told = verdict(file, status, work / "damaged-run.log", models(job.out), goal)
            events.add(section, file=str(file.relative_to(job.out)), how=how, what=what, status=status, **told)
    sides = {state: events.of(f"weights {state}") for state in ("inside", "finished")}
    found = [one for each in sides.values() for one in each]
    return {
        "damages": {state: len(one) for state, one in sides.items()},
        "of kind": dict(Counter(Path(one["file"]).name.partition("-")[0] for one in found)),
        "how": dict(Counter(one["how"] for one in found)),
        **{state: dict(Counter(one["verdict"] for one in each)) for state, each in sides.items()},
        "silent": sum(one["verdict"] == "silent" for one in found),
        "unclear": sum(one["verdict"] == "unclear" for one in found),
    }


def keep(out: Path, there: Path) -> None:
    shutil.copytree(out, fresh(there), symlinks=True)


def whereof(run: Path) -> list[str]:
    """Every file of checkpoints, of finished stages' models, and their ``done.json``."""
    patterns = ("0*/checkpoints/step-*/**/*", "0*/model/**/*", "0*/done.json")
    return sorted({str(one.relative_to(run)) for p in patterns for one in run.glob(p) if one.is_file()})


def damage(file: Path, how: str, rng: random.Random) -> str:
    data = file.read_bytes()
    if how == "deleted":
        file.unlink()
        return how
    at = rng.randrange(len(data) * 8) if how == "bit" else rng.randrange(1, len(data))
    flipped = data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :]
    file.write_bytes({"bit": flipped, "cut": data[:at], "emptied": b""}[how])
    return {"bit": f"bit {at}", "cut": f"cut to {at} of {len(data)}", "emptied": how}[how]


def models(out: Path) -> dict[str, bytes]:
    """Every file of the models of stages that are said to be done; and their last one's log of losses."""
    done = [one.parent for one in sorted(out.glob("0*/done.json"))]
    return {
        str(file.relative_to(out)): file.read_bytes()
        for one in done
        for file in (one / "model").rglob("*")
        if file.is_file()
    }


def verdict(file: Path, status: int, log: Path, made: dict[str, bytes], goal: dict[str, bytes]) -> dict[str, Any]:
    """What became of a damage. ``silent``: the command is content with another student than the undisturbed one's, and says nothing."""
    line, clear = one_line(log)
    text = log.read_text(errors="replace")
    named = file.name in text or file.parent.name in text
    if status:
        kind = "refused by name" if clear and named else "unclear"
    elif made == goal:
        kind = "mended, told" if named else "mended or not needed, not told"
    else:
        kind = "told, not mended" if named else "silent"
    return {"verdict": kind, "line": line[-400:] if kind != "mended or not needed, not told" else ""}
