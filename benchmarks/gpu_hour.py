"""Every question that needs a GPU, in order of worth, by one command that may be stopped and run again.

    python -m benchmarks.gpu_hour --minutes 25
    python -m benchmarks.gpu_hour --device cpu --small         # tries the list where there is no GPU

Each part is a benchmark of this folder in a process of its own, with a limit of its own; what it prints lies under ``runs/gpu_hour``. Its
result is written as soon as it is there: ``results/gpu_hour-<machine>.json``. A part that fails is told with its last lines, and the next
one begins. The same command goes on with what has no answer of this machine and commit yet (of today, where there is no git).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, machine, print_table
from benchmarks.gpu_parts import PARTS, Part

ROOT = Path(__file__).parent.parent
LOGS = ROOT / "runs" / "gpu_hour"
LEAST_SECONDS = 30.0
"""A part is not begun with less left."""
GRACE_SECONDS = 5.0
LAST_LINES = 12
ANSWERED = ("done", "failed", "too long")
"""States of a part that is not asked again by itself; what ``--minutes`` cut off is."""


@dataclass(frozen=True)
class Answer:
    """What became of a part: the state, its seconds, and its last JSON line or its last lines."""

    state: str
    seconds: float
    result: dict[str, Any] | None
    last_lines: list[str]


def ask(part: Part, device: str, small: bool, seconds: float, logs: Path) -> Answer:
    """Run a part, ``seconds`` at most, and what it started with it."""
    logs.mkdir(parents=True, exist_ok=True)
    out, errors = (logs / f"{slug(part.name)}.{kind}" for kind in ("out", "err"))
    began = time.monotonic()
    limit = min(part.limit(small), seconds)
    with out.open("wb") as stdout, errors.open("wb") as stderr:
        process = subprocess.Popen(
            part.command(device, small), cwd=ROOT, stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            ended = process.poll() is not None
            end(process)
    took = round(time.monotonic() - began, 1)
    result, lines = last_json(out), [*tail(out), *tail(errors)][-LAST_LINES:]
    if not ended:
        return Answer("too long" if limit == part.limit(small) else "cut", took, None, lines)
    if process.returncode or result is None:
        return Answer("failed", took, result, [*lines, f"exit status {process.returncode}"])
    return Answer("done", took, result, [])


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the whole group, SIGKILL to what is still there a little later."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


def last_json(out: Path) -> dict[str, Any] | None:
    """The object on the last line, as every benchmark prints one."""
    lines = tail(out)
    with suppress(ValueError, IndexError):
        body = json.loads(lines[-1])
        return body if isinstance(body, dict) else None
    return None


def tail(file: Path) -> list[str]:
    lines = file.read_text(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-LAST_LINES:]


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def commit() -> str:
    """Of the checkout; "" where there is no git."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    with suppress(OSError):
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return ""


class Results:
    """Every part's answer on one machine, in one file that is written anew behind each of them."""

    def __init__(self, folder: Path, described: Mapping[str, Any], small: bool):
        name = slug(described["machine"]) + ("-small" if small else "")
        self.file, self.machine = folder / f"gpu_hour-{name}.json", dict(described)
        self.now = {"date": described["date"], "commit": commit()}
        self.parts: dict[str, dict[str, Any]] = {}
        if self.file.is_file():
            try:
                self.parts = dict(json.loads(self.file.read_text())["parts"])
            except (ValueError, KeyError, TypeError):
                sys.exit(f"gpu_hour: {self.file} holds no answers: remove it")

    def answered(self, part: Part) -> bool:
        """By this commit, whenever; where there is no git, today."""
        there = self.parts.get(part.name, {})
        same = "commit" if self.now["commit"] else "date"
        return there.get("state") in ANSWERED and there.get(same) == self.now[same]

    def add(self, part: Part, answer: Answer, command: Sequence[str]) -> None:
        """An older answer stays where the minutes ended before a new one."""
        if answer.state == "cut" and part.name in self.parts:
            return
        told = {"result": answer.result} if answer.result else {}
        lines = {"last_lines": answer.last_lines} if answer.last_lines else {}
        body = {"state": answer.state, "seconds": answer.seconds, **self.now, "command": " ".join(command[1:])}
        self.parts[part.name] = {**body, **told, **lines}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_suffix(".draft")
        draft.write_text(json.dumps({"machine": self.machine, "parts": self.parts}, indent=1) + "\n")
        draft.replace(self.file)


def figures(part: Part, body: Mapping[str, Any]) -> dict[str, Any]:
    """What the table shows of a result; of [smallest, median, largest] the median."""
    found = {}
    for label, keys in part.figures.items():
        value: Any = body.get("result")
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found[label] = value[len(value) // 2] if isinstance(value, list) else value
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--minutes", type=float, default=25.0, help="nothing runs longer; call it again to go on")
    parser.add_argument("--small", action="store_true", help="small shapes: tries the list, its figures say nothing")
    parser.add_argument("--only", nargs="+", metavar="PART", help="only these parts")
    parser.add_argument("--again", action="store_true", help="ask what has an answer already, too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--logs", type=Path, default=LOGS, help="folder of what the parts print")
    return parser.parse_args(arguments)


def chosen(parts: Sequence[Part], only: Sequence[str] | None) -> list[Part]:
    names = [part.name for part in parts]
    if unknown := [one for one in only or () if one not in names]:
        sys.exit(f"gpu_hour: --only {unknown[0]!r} is no part: choose from {', '.join(map(repr, names))}")
    return [part for part in parts if only is None or part.name in only]


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> None:
    options = parse(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("gpu_hour: there is no CUDA device here: try the list by --device cpu --small")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # a part ends with this command
    until = time.monotonic() + 60 * options.minutes
    wanted = chosen(parts, options.only)
    results = Results(options.results, machine(options.device), options.small)
    asked: set[str] = set()
    for part in wanted:
        left = until - time.monotonic()
        if left < LEAST_SECONDS:
            break
        if options.again or not results.answered(part):
            print(f"{part.name} …", flush=True)
            answer = ask(part, options.device, options.small, left, options.logs)
            results.add(part, answer, part.command(options.device, options.small))
            asked.add(part.name)
            print(f"{part.name}: {answer.state}, {answer.seconds:.0f} s", *answer.last_lines, sep="\n  ", flush=True)
    report(wanted, results, asked)


def report(wanted: Sequence[Part], results: Results, asked: set[str]) -> None:
    """A line a part, and a JSON line."""
    rows, told, open_parts = [], {}, []
    for part in wanted:
        there = results.parts.get(part.name, {})
        if not results.answered(part):
            open_parts.append(part.name)
        shown = figures(part, there)
        told[part.name] = {key: there.get(key) for key in ("state", "seconds", "date", "commit")} | {"figures": shown}
        cells = (there.get("state", "open"), there.get("seconds", ""), there.get("date", ""))
        new = "now" if part.name in asked else ""
        rows.append((part.name, *cells, new, ", ".join(f"{label} {value}" for label, value in shown.items())))
    print()
    print_table(("part", "state", "seconds", "date", "asked", "figures"), rows)
    if open_parts:
        print(f"open: {', '.join(open_parts)}; the same command goes on")
    body = {"machine": results.machine, "file": results.file.name, "parts": told, "open": open_parts}
    print(json.dumps({"benchmark": "gpu_hour", **body}))


if __name__ == "__main__":
    main()
