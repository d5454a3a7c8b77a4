"""SIGKILL at random moments of capture and training, then the same job again: the bytes that an undisturbed one leaves."""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.fault_jobs import (
    Events,
    Job,
    capture_job,
    capture_request,
    forked,
    fresh,
    identities,
    killed_after,
    mixture,
    training_job,
    tree,
    wait,
    whole_run,
)
from pipelines.inspect.cache import check, collect_garbage
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.commit import committed_shards, read_commit
from teacher_cache.shards.storage import Storage

WATCHED = ("manifest.json", "teacher/*/calibration/*", "fields/*/field.json", "*/commits/*", "fields/*/commits/*")
"""Kills aimed at the moments behind a write: when a further file of this kind appears."""
AIMED = 0.3
"""Share of kills that are aimed; the others fall anywhere between start and end of an undisturbed run."""
COLUMNS = 6


def undisturbed(job: Job) -> float:
    """Seconds of a whole run into an empty folder."""
    fresh(job.out)
    status, seconds = whole_run(job, job.out.parent / f"{job.out.name}.log")
    if status:
        raise SystemExit((job.out.parent / f"{job.out.name}.log").read_text())
    return seconds


def teacher_name(teacher: str) -> str:
    """Under which kills are counted."""
    return "null" if teacher.startswith("null:") else Path(teacher).name


def kill(job: Job, whole: Path, seconds: float, rng: random.Random) -> tuple[int, str]:
    """(exit status of a run that was to be killed, how the moment was chosen). ``whole``: the undisturbed cache."""
    to_come = [pattern for pattern in WATCHED if len(list(job.out.glob(pattern))) < len(list(whole.glob(pattern)))]
    if not to_come or rng.random() >= AIMED:
        return killed_after(job, rng.uniform(0, seconds)), "random"
    pattern = rng.choice(to_come)
    before = len(list(job.out.glob(pattern)))
    return killed_after(job, rng.uniform(0, 0.02), lambda: len(list(job.out.glob(pattern))) > before), pattern


def where(out: Path) -> str:
    """What the kill met, by what stands."""
    if not (out / "manifest.json").exists():
        return "planning"
    described = len(list(out.glob("fields/*/field.json")))
    commits = len([*out.glob("samples/commits/*.json"), *out.glob("fields/*/commits/*.json")])
    if described < COLUMNS - 1:
        return "describing and calibrating"
    return "shards" if commits else "before the first commit"


def committed(out: Path) -> list[Path]:
    """Files of finished shards, and the documents that they are bound to."""
    storage = Storage(str(out))
    found = [*out.glob("manifest.json"), *out.glob("fields/*/field.json")]
    for column in ("samples", *(f"fields/{one.name}" for one in out.glob("fields/*"))):
        for shard in committed_shards(storage, column):
            commit = read_commit(storage, column, shard)
            names = (f"commits/{shard:06d}.json", f"data/{commit.tar}", f"index/{commit.index}")
            found += [out / column / name for name in names]
    return found


def begun(out: Path, drafts_before: set[str]) -> tuple[int, int]:
    """(shards that this run had begun and not ended, shards that are all there)."""
    columns = ["samples", *(f"fields/{one.name}" for one in out.glob("fields/*"))]
    done = [set(committed_shards(Storage(str(out)), column)) for column in columns]
    whole, some = set.intersection(*done), set.union(*done)
    drafts = {one.name for one in (out / ".staging").glob("*.tar")} - drafts_before
    shards = {int(name.split("-")[-2]) for name in drafts}
    return len((some | shards) - whole), len(whole)


def capture_kills(events: Events, work: Path, teacher: str, count: int, seed: int) -> dict[str, Any]:
    """Kills of one capture after another, each cache compared with the undisturbed one when it is done."""
    section, data = f"capture-kills {teacher_name(teacher)}", mixture(work)
    once = capture_job(capture_request(teacher, data, work / "undisturbed"))
    seconds, goal = undisturbed(once), tree(once.out)
    job = capture_job(capture_request(teacher, data, work / "killed"))
    rng = random.Random(seed + len(events.of(section)))
    fresh(job.out)
    before: dict[str, tuple[int, int]] = {}
    while sum(event["event"] == "kill" for event in events.of(section)) < count:
        drafts = {one.name for one in (job.out / ".staging").glob("*.tar")}
        status, aim = kill(job, once.out, seconds, rng)
        after = identities([Path(name) for name in before if Path(name).exists()])
        touched = sum(after.get(name) != place for name, place in before.items())
        if status == -signal.SIGKILL:
            half, whole = begun(job.out, drafts) if (job.out / "manifest.json").exists() else (0, 0)
            place = where(job.out)
            events.add(section, event="kill", aim=aim, where=place, half=half, whole=whole, touched=touched)
            before = identities(committed(job.out))
            continue
        events.add(section, event="end", touched=touched, **ended(job, goal, status))
        fresh(job.out)
        before = {}
    if events.of(section)[-1]["event"] == "kill":
        status = wait(forked(job.run))
        events.add(section, event="end", touched=0, **ended(job, goal, status))
    return {"seconds undisturbed": round(seconds, 2), **kills_summary(events.of(section))}


def ended(job: Job, goal: dict[str, bytes], status: int) -> dict[str, Any]:
    """Whether a finished cache is the undisturbed one: verify finds nothing, and after ``gc`` it has the same files and no others."""
    cache = TeacherCache(str(job.out))
    problems, garbage = check(cache), collect_garbage(cache, remove=True)
    scratch = [str(one) for name in (".staging", "progress") for one in (job.out / name).glob("*")]
    same = status == 0 and not problems and not scratch and tree(job.out) == goal
    return {"same": same, "status": status, "problems": list(map(str, problems)), "garbage": len(garbage)}


def kills_summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    kills = [one for one in events if one["event"] == "kill"]
    ends = [one for one in events if one["event"] == "end"]
    return {
        "kills": len(kills),
        "aimed at a write": sum(one["aim"] != "random" for one in kills),
        "fell on": dict(Counter(one["where"] for one in kills)),
        "caches finished": len(ends),
        "of them byte-identical": sum(one["same"] for one in ends),
        "shards half done at a kill, most": max((one["half"] for one in kills), default=0),
        "committed files touched by a resume": sum(one["touched"] for one in events),
    }


def training_kills(
    events: Events, work: Path, cache: Callable[[], Path], student: str, count: int, seed: int
) -> dict[str, Any]:
    """Kills of one training after another; final weights and logged losses compared bit by bit."""
    section, made = "training-kills", cache()
    once = training_job(made, work / "trained", student)
    seconds, goal = undisturbed(once), trained(once.out)
    job = training_job(made, work / "train-killed", student)
    rng = random.Random(seed + len(events.of(section)))
    fresh(job.out)
    while sum(event["event"] == "kill" for event in events.of(section)) < count:
        if killed_after(job, rng.uniform(0, seconds)) == -signal.SIGKILL:
            events.add(section, event="kill", where=progress(job.out))
            continue
        events.add(section, event="end", same=trained(job.out) == goal)
        fresh(job.out)
    if events.of(section)[-1]["event"] == "kill":
        wait(forked(job.run, work / "train-killed.log"))
        events.add(section, event="end", same=trained(job.out) == goal)
    found = events.of(section)
    ends = [one for one in found if one["event"] == "end"]
    return {
        "seconds undisturbed": round(seconds, 2),
        "kills": len(found) - len(ends),
        "fell on": dict(Counter(one["where"] for one in found if one["event"] == "kill")),
        "runs finished": len(ends),
        "of them with the same weights and losses": sum(one["same"] for one in ends),
    }


def trained(out: Path) -> tuple[Any, ...]:
    """Weights of the last stage, bytes, and its metrics without their wall time; () where it is not done."""
    stages = sorted(out.glob("0*"))
    if not stages or not (stages[-1] / "done.json").exists():
        return ()
    lines = [json.loads(line) for line in (stages[-1] / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if not name.endswith("seconds")} for line in lines]
    return (stages[-1] / "model" / "model.safetensors").read_bytes(), metrics


def progress(out: Path) -> str:
    """What the kill met."""
    saved = sorted(one.name for one in out.glob("0*/checkpoints/step-*"))
    if not list(out.glob("0*/metrics.jsonl")):
        return "loading"
    if list(out.glob("0*/checkpoints/.draft-*")):
        return "inside a checkpoint"
    return "behind a checkpoint" if saved else "before the first checkpoint"
