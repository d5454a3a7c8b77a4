"""What became slower since the last saved result of the same benchmark on the same kind of machine: named behind every run.

Ratios inside one run are compared, which a slow machine changes little; more than ``SLACK`` worse is told. ``WATCHED`` says which figures
of a benchmark's JSON are watched, and whether more of them is better.

    python -m benchmarks.regressions step packing        # runs them, and ends with 1 where something became slower
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SLACK = 0.15
"""Of a figure: the ratios of busy machines spread by about as much."""


@dataclass(frozen=True)
class Watched:
    """Figures of a JSON body. path: keys; ``*`` is every key there. more: more is better."""

    path: tuple[str, ...]
    more: bool = False


WATCHED: Mapping[str, tuple[Watched, ...]] = {
    "step": (Watched(("ratios", "*", "measured over operations")), Watched(("decode", "*", "of its own step"))),
    "method_steps": (Watched(("ratios", "*", "over operations")),),
    "packing": (Watched(("results", "*", "packed / unpacked")),),
    "loader": (Watched(("loader / student", "*"), more=True), Watched(("ours / webdataset",), more=True)),
    "capture": (Watched(("ratio_to_bare", "*"), more=True),),
    "encode_workers": (Watched(("*", "ratio to bare"), more=True),),
    "loss_memory": (Watched(("variants", "*", "of cross-entropy")),),
    "matching": (Watched(("times", "*", "share")),),
}


def figures(body: Any, path: tuple[str, ...], named: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """(its keys, value) of every figure at a path."""
    if not path:
        if isinstance(body, int | float) and not isinstance(body, bool):
            yield ", ".join(named), float(body)
    elif isinstance(body, Mapping):
        for key in body if path[0] == "*" else [path[0]]:
            if key in body:
                yield from figures(body[key], path[1:], (*named, key))


def slower(name: str, now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """A line for every watched figure that both results have and that became worse."""
    lines = []
    for watched in WATCHED.get(name, ()):
        old = dict(figures(before, watched.path))
        for label, value in figures(now, watched.path):
            if (was := old.get(label)) is None or was <= 0 or value <= 0:
                continue
            if (was / value if watched.more else value / was) > 1 + SLACK:
                date = before.get("machine", {}).get("date", "earlier")
                lines.append(f"slower than on {date}: {name}: {label}: {was:.3g} → {value:.3g}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(WATCHED), metavar="NAME", help=", ".join(sorted(WATCHED)))
    found: dict[str, list[str]] = {}
    for name in parser.parse_args(arguments).names:
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"benchmarks.{name} failed ({done.returncode})")
        *_, last = done.stdout.splitlines()
        found[name] = json.loads(last)["slower"]
    for line in (one for lines in found.values() for one in lines):
        print(line)
    print(json.dumps({"slower": found}))
    raise SystemExit(int(any(found.values())))


if __name__ == "__main__":
    main()
