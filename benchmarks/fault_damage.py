"""Single-bit flips and truncations of every kind of file of a cache: named by verify one by one, then repaired by rounds."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.fault_jobs import PARAMS, Events, files, forked, fresh, identities, tree, wait
from pipelines.capture.worker import CaptureRequest
from pipelines.edit.repair import RepairRequest, repair
from pipelines.inspect.cache import survey

KINDS = {
    "manifest": ["manifest.json"],
    "field.json": ["fields/*/field.json"],
    "commit": ["samples/commits/*", "fields/*/commits/*"],
    "index": ["samples/index/*", "fields/*/index/*"],
    "tar": ["samples/data/*", "fields/*/data/*"],
    "calibration": ["teacher/*/calibration/*"],
    "head": ["teacher/*/head.*"],
    "processor": ["teacher/*/processor/*", "teacher/*/processor.json"],
}
A_ROUND = 40
"""Damages that lie in the cache at the same time when it is repaired, in files of their own."""


def damaged(data: bytes, cut: bool, rng: random.Random) -> tuple[bytes, str]:
    """One bit flipped, or the end cut off; and in words."""
    if cut:
        length = rng.randrange(len(data))
        return data[:length], f"cut to {length} of {len(data)} bytes"
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :], f"byte {at} bit {bit}"


def is_named(file: Path, cache: Path, problems: list[Any]) -> bool:
    """Whether verify leads to the file: by column and shard where it is of a shard, else by its folder or name."""
    relative = file.relative_to(cache)
    if file.name[:6].isdecimal():
        place = (str(relative.parent.parent), int(file.name[:6]))
        return any((one.column, one.shard) == place for one in problems)
    places = {one.column for one in problems}
    return any(str(relative).startswith(place) for place in places) or any(file.name in one.what for one in problems)


def damages(
    events: Events, work: Path, cache: Callable[[], Path], request: CaptureRequest, flips: int, cuts: int, seed: int
) -> dict[str, Any]:
    """Every damage alone before ``verify``; then all of a round at once before ``repair``."""
    section, whole = "damage", cache()
    goal, folder, log = tree(whole), work / "damaged", work / "repair.log"
    while True:
        so_far = [event for event in events.of(section) if event["event"] == "damage"]
        left = {True: cuts - sum(one["cut"] for one in so_far), False: flips - sum(not one["cut"] for one in so_far)}
        if all(count <= 0 for count in left.values()):
            break
        rng = random.Random(f"{seed} {len(so_far)}")
        shutil.copytree(whole, fresh(folder))
        chosen: dict[Path, bytes] = {}
        for number in range(A_ROUND):
            file = pick(folder, list(KINDS)[(len(so_far) + number) % len(KINDS)], chosen, rng)
            cut = left[True] > 0 and (left[False] <= 0 or rng.random() < left[True] / (left[True] + left[False]))
            if file is None or left[cut] <= 0:
                continue
            chosen[file], what = damaged(file.read_bytes(), cut, rng)
            left[cut] -= 1
            events.add(section, event="damage", cut=cut, **alone(file, folder, chosen[file], what))
        for file, data in chosen.items():
            file.write_bytes(data)
        events.add(section, event="round", **repaired(folder, request, goal, chosen, log))
    return summary(events.of(section))


def pick(folder: Path, kind: str, taken: dict[Path, bytes], rng: random.Random) -> Path | None:
    """A file of this kind that is whole still."""
    found = [file for pattern in KINDS[kind] for file in sorted(folder.glob(pattern)) if file not in taken]
    return rng.choice([file for file in found if file.stat().st_size]) if found else None


def alone(file: Path, folder: Path, data: bytes, what: str) -> dict[str, Any]:
    """What verify says of one damage, which is taken back then."""
    before = file.read_bytes()
    file.write_bytes(data)
    problems = survey(str(folder))[1]
    file.write_bytes(before)
    kind = next(name for name, patterns in KINDS.items() if any(file.relative_to(folder).match(p) for p in patterns))
    named = is_named(file, folder, problems)
    return {"kind": kind, "detected": bool(problems), "named": named, "what": f"{file.relative_to(folder)} {what}"}


def repaired(
    folder: Path, request: CaptureRequest, goal: dict[str, bytes], chosen: dict[Path, bytes], log: Path
) -> dict[str, Any]:
    """Repair in a child; is every byte back, and is nothing but the damaged shards and files written anew?"""
    places = {(file.parent.parent, file.name[:6]) for file in chosen if file.name[:6].isdecimal()}
    theirs = {one for column, shard in places for one in column.glob(f"*/{shard}*")}
    others = [file for file in files(folder) if file not in chosen and file not in theirs]
    before = identities(others)
    asked = RepairRequest(str(folder), request.teacher, request.data, request.settings, PARAMS)

    def mend() -> None:
        left = repair(asked)["left"]
        for one in left:
            print(one)
        raise SystemExit(bool(left))

    status = wait(forked(mend, log))
    now = tree(folder)
    clean = status == 0 and survey(str(folder))[1] == []
    untouched = identities([file for file in others if file.exists()]) == before
    said = "" if clean else log.read_text()[-2000:]
    return {"damages": len(chosen), "same": clean and now == goal, "untouched": untouched, "said": said}


def summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    found = [one for one in events if one["event"] == "damage"]
    rounds = [one for one in events if one["event"] == "round"]
    return {
        "flips": sum(not one["cut"] for one in found),
        "truncations": sum(one["cut"] for one in found),
        "of kind": dict(Counter(one["kind"] for one in found)),
        "detected by verify": sum(one["detected"] for one in found),
        "named by verify": sum(one["named"] for one in found),
        "repairs": len(rounds),
        "damages repaired at a time, mean": round(sum(one["damages"] for one in rounds) / max(1, len(rounds)), 1),
        "byte-identical after repair": sum(one["same"] for one in rounds),
        "nothing else touched": sum(one["untouched"] for one in rounds),
    }
