"""Every reader of foreign bytes against many hostile inputs: only the project's own errors come out, and memory stays bounded.

    python -m benchmarks.fuzz --inputs 100000 --save
    python -m benchmarks.fuzz --inputs 100000 --save --only "symbols of" "hidden sketch"    # saved under a name of their own

Inputs are made by hypothesis (``benchmarks.fuzz_targets`` says how); each target gets the same number of them. What must not come out is
printed with the smallest input that hypothesis finds for it, and the run fails at its end. A run that was broken off goes on where it was
(``--state``). ``taken``: inputs that a reader took for whole.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from benchmarks.common import argument_parser, finish, machine, print_table
from benchmarks.fuzz_targets import Target, targets

BATCH = 500
MOST_GROWTH = 2 << 30
"""Bytes that a target may add to the peak of the process."""


def fuzz(target: Target, inputs: int, number: int) -> dict[str, Any]:
    """``{"inputs", "taken", "seconds", "grown": bytes of the peak, "failure": "" or what came out}`` of so many inputs."""
    count = {"inputs": 0, "taken": 0}

    @seed(number)
    @settings(max_examples=inputs, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: Any) -> None:
        way = data.draw(st.sampled_from(target.inputs))
        whole = way(data.draw)
        count["inputs"] += 1
        count["taken"] += target.try_one(whole)

    started, before, failure = time.perf_counter(), peak(), ""
    try:
        run()
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        print(f"{target.name}: {failure}", *getattr(error, "__notes__", ()), sep="\n", flush=True)
    return {**count, "seconds": time.perf_counter() - started, "grown": peak() - before, "failure": failure}


def peak() -> int:
    """Most bytes that the process ever held."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--inputs", type=int, default=4000, help="all targets together")
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="targets whose name is or holds one of these")
    parser.add_argument("--state", help="file that keeps what is done; a run with the same file goes on")
    arguments = parser.parse_args()
    state = Path(arguments.state) if arguments.state else None
    done: dict[str, dict[str, Any]] = json.loads(state.read_text()) if state and state.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="kdcli-fuzz-") as scratch:
        every = {one.name: one for one in targets(Path(scratch))}
        chosen = [every[name] for name in chosen_names(list(every), arguments.only)]
        share = -(-arguments.inputs // len(chosen))
        while left := [one for one in chosen if to_do(done, one.name, share)]:
            for target in left:  # in turn, so that a run that is broken off has tried everything
                total = done[target.name]
                batch = fuzz(target, min(BATCH, share - total["inputs"]), total["inputs"])
                for key in ("inputs", "taken", "seconds"):
                    total[key] += batch[key]
                total["grown"], total["failure"] = max(total["grown"], batch["grown"]), batch["failure"]
                if state:
                    state.write_text(json.dumps(done))
    report([(one.name, done[one.name]) for one in chosen], arguments)


def chosen_names(names: Sequence[str], only: Sequence[str] | None) -> list[str]:
    """Targets by whole name, else by part of it; all where nothing was named."""
    if only is None:
        return list(names)
    found: set[str] = set()
    for words in only:
        ours = {words} if words in names else {name for name in names if words in name}
        if not ours:
            sys.exit(f"fuzz: --only {words!r} is part of no target's name: choose from {', '.join(map(repr, names))}")
        found |= ours
    return [name for name in names if name in found]


def to_do(done: dict[str, dict[str, Any]], name: str, share: int) -> bool:
    total = done.setdefault(name, {"inputs": 0, "taken": 0, "seconds": 0.0, "grown": 0, "failure": ""})
    return total["inputs"] < share and not total["failure"]


def report(rows: list[tuple[str, dict[str, Any]]], arguments: Any) -> None:
    cells = [
        [
            name,
            one["inputs"],
            one["taken"],
            f"{one['grown'] / 1e6:.0f} MB",
            f"{one['seconds']:.0f} s",
            one["failure"][:60],
        ]
        for name, one in rows
    ]
    print_table(["target", "inputs", "taken", "peak grew", "time", "failure"], cells)
    failed = [name for name, one in rows if one["failure"] or one["grown"] > MOST_GROWTH]
    body = {
        "machine": machine("cpu"),
        "shapes": "hostile" if arguments.only is None else f"hostile, {len(rows)} readers",
        "inputs": sum(one["inputs"] for _, one in rows),
        "taken": sum(one["taken"] for _, one in rows),
        "failed": failed,
        "peak_bytes": peak(),
        "targets": {name: {**one, "seconds": round(one["seconds"], 1)} for name, one in rows},
    }
    finish("fuzz", body, arguments.save)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
