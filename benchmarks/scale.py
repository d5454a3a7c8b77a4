"""What do a million rows cost beside the teacher: planning, shards, commits, checks, opening, streaming; and does memory grow with them?

A mixture of tiny rows goes through the real commands with the null teacher (``teacher_cache/teachers/null.py``), at a sixteenth, a quarter
and the whole of ``--rows``; beside it a json as large as LLaVA-1.5's is planned. Every stage is a process of its own (capture: with its
workers), of which wall time and peak memory are noted.

    python -m benchmarks.scale --rows 1200000 --shards 512 --save      # tens of minutes, about 6 GB; run it again to continue
    python -m benchmarks.scale --rows 20000 --shards 64                # a try
    python -m benchmarks.scale --table                                 # the tables of docs/scaling.md, from what was saved

Finished stages are kept in ``--work``; what is measured anew is what is not there.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import argument_parser, finish, machine, print_table
from benchmarks.memory import watched
from benchmarks.scale_mixtures import PLANNED_ROWS, long_rows, tiny_rows, write_mixture, write_pictures
from benchmarks.scale_tables import print_tables

PARTS_OF_THE_WHOLE = (16, 4, 1)
SETTINGS = "[fields.response_topk]\nk = 1\n"
"""The least that a field can store: tens of bytes a row."""
IMPORTS = "import pipelines.capture.cache_teacher, rich.progress; from transformers import AutoConfig, AutoProcessor"
"""What every command of a capture imports before it does anything."""
TARGETS = {"open_seconds": 2.0, "capture again": 5.0}


class Bench:
    """The stages of one size, each measured once; ``results.json`` in the work folder remembers them."""

    def __init__(self, work: Path, teacher: str, shards: int, workers: int):
        self.work, self.teacher, self.shards, self.workers = work, teacher, shards, workers
        self.settings, self.pictures = work / "kd.toml", work / "pictures"
        self._file = work / "results.json"
        self.results: dict[str, Any] = json.loads(self._file.read_text()) if self._file.is_file() else {}

    def once(self, size: str, stage: str, run: Callable[[], dict[str, Any]]) -> None:
        """Measure a stage unless it is measured already."""
        stages = self.results.setdefault(size, {})
        if stage in stages:
            return
        print(f"{size}: {stage} …", file=sys.stderr, flush=True)
        stages[stage] = run()
        draft = self._file.with_suffix(".draft")
        draft.write_text(json.dumps(self.results, indent=1))
        draft.replace(self._file)

    def command(self, *words: str) -> dict[str, Any]:
        """Seconds and MiB of a ``kdcli`` command."""
        return self._measure([sys.executable, "-P", "-m", "cli", *words])[0]

    def _measure(self, command: Sequence[str]) -> tuple[dict[str, Any], str]:
        done = watched(command)
        numbers = {"seconds": done.seconds, "mib": done.largest_mib, "mib_together": done.together_mib}
        return {name: round(value, 2) for name, value in numbers.items()}, done.output

    def mixture(self, rows: int, name: str, kind: Callable[[int], Any]) -> Path:
        path = self.work / f"{name}-{rows}.json"
        if not path.is_file():
            write_pictures(self.pictures)
            write_mixture(kind(rows), path)
        return path

    def capture_words(self, data: Path, out: Path) -> list[str]:
        words = [
            "cache-teacher",
            "--config",
            str(self.settings),
            "--teacher",
            f"null:{self.teacher}",
            "--fields",
            "response_topk",
        ]
        words += [
            "--data",
            str(data),
            "--image-root",
            str(self.pictures),
            "--shards",
            str(self.shards),
            "--out",
            str(out),
        ]
        return [*words, "--workers", str(self.workers)]

    def tiny(self, rows: int) -> None:
        """All stages of a capture of so many tiny rows."""
        size, cache = str(rows), self.work / f"cache-{rows}"
        words = self.capture_words(self.mixture(rows, "tiny", tiny_rows), cache)
        self.once(size, "imports alone", lambda: self._measure([sys.executable, "-c", IMPORTS])[0])
        self.once(size, "plan and describe", lambda: self.command(*words, "--prepare-only"))
        self.once(size, "capture", lambda: self._fresh_capture(words, cache))
        self.once(size, "capture again", lambda: self.command(*words))
        self.once(size, "cache status", lambda: self.command("cache", "status", str(cache), "--json"))
        self.once(size, "cache verify", lambda: self.command("cache", "verify", str(cache)))
        self.once(size, "train side", lambda: self._read(cache))
        self.once(size, "files", lambda: count_files(cache))

    def _fresh_capture(self, words: list[str], cache: Path) -> dict[str, Any]:
        """From the plan on: shards of an earlier try that was cut off would not be counted."""
        for folder in (
            "samples",
            "fields/response_topk/commits",
            "fields/response_topk/data",
            "fields/response_topk/index",
        ):
            shutil.rmtree(cache / folder, ignore_errors=True)
        return self.command(*words)

    def _read(self, cache: Path) -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.scale_reading", str(cache), self.teacher]
        numbers, output = self._measure(command)
        return {**numbers, **json.loads(output.splitlines()[-1])}

    def planned(self, rows: int) -> None:
        """A json with real lengths: what ``kdcli plan`` and the plan of a capture take."""
        data, size = self.mixture(rows, "long", long_rows), f"long-{rows}"
        again = ["--data", str(data), "--image-root", str(self.pictures), "--teacher", f"null:{self.teacher}"]
        self.once(
            size, "kdcli plan", lambda: self.command("plan", *again, "--sample", "64", "--shards", str(self.shards))
        )
        words = [*self.capture_words(data, self.work / f"cache-long-{rows}"), "--prepare-only"]
        self.once(size, "plan and describe", lambda: self.command(*words))
        self.once(size, "plan and describe again", lambda: self.command(*words))
        self.once(size, "files", lambda: {"json_bytes": data.stat().st_size})


def count_files(cache: Path) -> dict[str, Any]:
    """What a store must hold."""
    files = [file for file in cache.rglob("*") if file.is_file()]
    manifest = (cache / "manifest.json").stat().st_size
    return {"files": len(files), "bytes": sum(file.stat().st_size for file in files), "manifest_bytes": manifest}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--rows", type=int, default=1_200_000, help="rows of the largest mixture")
    parser.add_argument("--shards", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2, help="of the captures")
    parser.add_argument("--planned-rows", type=int, default=None, help="rows of the json that is planned only")
    parser.add_argument("--work", default="runs/scale", help="folder of mixtures, caches and finished stages")
    parser.add_argument("--table", action="store_true", help="measure nothing, print tables of what was saved")
    parser.add_argument(
        "--tokens-per-second", type=float, default=25_000, help="with --table: of one GPU's teacher, assumed"
    )
    parser.add_argument(
        "--samples-per-second", type=float, default=30, help="with --table: that one GPU trains, assumed"
    )
    options = parser.parse_args(arguments)
    if options.table:
        print_tables(options.tokens_per_second, options.samples_per_second)
        return
    work = Path(options.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    (work / "kd.toml").write_text(SETTINGS)
    described = machine("cpu")
    bench = Bench(work, str(Path(options.models) / "teacher"), options.shards, options.workers)
    sizes = [options.rows // part for part in PARTS_OF_THE_WHOLE]
    for rows in sizes:
        bench.tiny(rows)
    planned = options.planned_rows or min(PLANNED_ROWS, options.rows)
    bench.planned(planned)
    body = {
        "machine": described,
        "shapes": "tiny",
        "shards": options.shards,
        "workers": options.workers,
        "targets": TARGETS,
        "sizes": {str(rows): bench.results[str(rows)] for rows in sizes},
        "planned": {"rows": planned, **bench.results[f"long-{planned}"]},
    }
    report(body)
    finish("scale", body, options.save)


def report(body: dict[str, Any]) -> None:
    sizes = body["sizes"]
    header = ["stage", *(f"{int(rows):,} rows, s" for rows in sizes), *(f"{int(rows):,}, MiB" for rows in sizes)]
    stages = [stage for stage in next(iter(sizes.values())) if stage != "files"]
    table = [
        [
            stage,
            *(f"{one[stage]['seconds']:.1f}" for one in sizes.values()),
            *(f"{one[stage]['mib']:.0f}" for one in sizes.values()),
        ]
        for stage in stages
    ]
    print_table(header, table)
    print()
    names = ("open_seconds", "open_mib", "rows_per_second", "mib_before", "mib_at_most")
    print_table(
        ["train side", *sizes], [[name, *(one["train side"][name] for one in sizes.values())] for name in names]
    )
    print()
    planned = body["planned"]
    rows = [
        [stage, f"{one['seconds']:.1f}", f"{one['mib']:.0f}"]
        for stage, one in planned.items()
        if isinstance(one, dict) and "mib" in one
    ]
    print_table([f"json of {planned['rows']:,} rows, {planned['files']['json_bytes'] / 1e9:.2f} GB", "s", "MiB"], rows)
    print()


if __name__ == "__main__":
    main()
