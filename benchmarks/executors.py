"""Do two workers take half the time of one, and what does Ray cost beside processes of this machine?

Whole ``kdcli cache-teacher`` commands with the null teacher, which sleeps ``--ms-per-row`` for every row as a GPU would be busy: what
is left is preparing, encoding, writing, commits and scheduling. One worker, two, and two on Ray, in turns.

    python -m benchmarks.executors [--rows 8192] [--shards 512] [--ms-per-row 25] [--repeats 3] [--save]

Two figures of each: the whole command, imports and the start of workers included, and the work alone, from the first commit to the last
in rows a second. The Ray cluster of this machine is started once, before everything, and its seconds stand apart.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import argument_parser, finish, interleave, machine, median_ratio, print_table, spread
from benchmarks.scale import SETTINGS
from benchmarks.scale_mixtures import tiny_rows, write_mixture, write_pictures

ROOT = Path(__file__).parent.parent
SPEED_TARGET, RAY_TARGET = 1.8, 1.05
COLUMN = "fields/response_topk"
"""Written after ``samples``: its commits end a shard."""


class Bench:
    """One mixture, captured again and again."""

    def __init__(self, folder: Path, teacher: str, rows: int, shards: int, ray_address: str | None):
        self.cache, self.rows, self.shards = folder / "cache", rows, shards
        self.work_seconds: dict[str, list[float]] = {}
        write_pictures(folder / "pictures")
        write_mixture(tiny_rows(rows), folder / "rows.json")
        (folder / "kd.toml").write_text(SETTINGS)
        words = [
            "--config",
            str(folder / "kd.toml"),
            "--teacher",
            teacher,
            "--fields",
            "response_topk",
            "--device",
            "cpu",
        ]
        words += ["--data", str(folder / "rows.json"), "--image-root", str(folder / "pictures")]
        self._command = [
            sys.executable,
            "-m",
            "cli",
            "cache-teacher",
            *words,
            "--shards",
            str(shards),
            "--out",
            str(self.cache),
        ]
        self._ray = ["--executor", "ray", "--ray-address", str(ray_address)]

    def run(self, name: str, workers: int) -> float:
        """Seconds of the whole command."""
        shutil.rmtree(self.cache, ignore_errors=True)
        ray = self._ray if name.startswith("ray") else []
        started = time.perf_counter()
        subprocess.run([*self._command, "--workers", str(workers), *ray], cwd=ROOT, check=True, capture_output=True)
        seconds = time.perf_counter() - started
        self.work_seconds.setdefault(name, []).append(self._work())
        return seconds

    def _work(self) -> float:
        """Seconds from the first shard's end to the last one's, for all shards as for these."""
        ends = sorted(file.stat().st_mtime for file in (self.cache / COLUMN / "commits").glob("*.json"))
        if len(ends) != self.shards:
            raise RuntimeError(f"{len(ends)} of {self.shards} shards are committed")
        return (ends[-1] - ends[0]) * self.shards / (self.shards - 1)


def start_ray(cpus: int) -> tuple[Any, str, float]:
    """(ray, address, seconds to start) of a cluster of this machine."""
    import ray

    started = time.perf_counter()
    context = ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    return ray, context.address_info["gcs_address"], time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__ or "")
    parser.set_defaults(repeats=3)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--shards", type=int, default=512)
    parser.add_argument("--ms-per-row", type=float, default=25.0, help="that the null teacher sleeps")
    parser.add_argument("--without-ray", action="store_true")
    options = parser.parse_args(arguments)
    described = machine("cpu")
    ray, address, ray_seconds = (None, None, 0.0) if options.without_ray else start_ray(2)
    teacher = f"null:{Path(options.models) / 'teacher'},ms_per_row={options.ms_per_row}"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), teacher, options.rows, options.shards, address)
        variants = {"one worker": 1, "two workers": 2, **({"ray, two workers": 2} if ray else {})}
        runs = {name: lambda name=name, count=count: bench.run(name, count) for name, count in variants.items()}
        seconds = interleave(runs, options.repeats)  # type: ignore[arg-type]
    if ray:
        ray.shutdown()
    ratios = {
        "two workers / one, whole command": median_ratio(seconds["one worker"], seconds["two workers"]),
        "two workers / one, work alone": median_ratio(
            bench.work_seconds["one worker"], bench.work_seconds["two workers"]
        ),
    }
    if ray:
        ratios["ray / local, whole command"] = median_ratio(seconds["ray, two workers"], seconds["two workers"])
        work = bench.work_seconds
        ratios["ray / local, work alone"] = median_ratio(work["ray, two workers"], work["two workers"])
    body = {
        "machine": described,
        "shapes": "tiny",
        "rows": options.rows,
        "shards": options.shards,
        "ms_per_row": options.ms_per_row,
        "repeats": options.repeats,
        "targets": {"two workers / one": SPEED_TARGET, "ray / local": RAY_TARGET},
        "seconds": {name: spread(each) for name, each in seconds.items()},
        "work_seconds": {name: spread(each) for name, each in bench.work_seconds.items()},
        "ray_start_seconds": round(ray_seconds, 2),
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
    }
    work_rows = [statistics.median(bench.work_seconds[name]) for name in seconds]
    lines = [
        (name, f"{one[1]:.1f}", f"{w:.1f}", f"{options.rows / w:.1f}")
        for (name, one), w in zip(body["seconds"].items(), work_rows)
    ]
    print_table(("executor", "command, s", "work, s", "rows/s"), lines)
    print()
    print_table(("ratio, median of ratios in a turn", "measured"), list(body["ratios"].items()))
    print()
    finish("executors", body, options.save)


if __name__ == "__main__":
    main()
