"""The tables of docs/scaling.md: what was measured (``results/``), and what it means for a whole capture on 8, 64 and 512 GPUs.

No GPU has been measured: a teacher's speed is a parameter, text and vision tokens a second of one GPU. Everything else is of the results of
``benchmarks.scale``, ``capture`` and ``overhead``, whose processors did the preparing, encoding and writing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from pipelines.terminal.tables import table

MIXTURES = {"779K (LLaVA-NeXT)": 779_289, "1.2M (LLaVA-1.5, both)": 1_223_426}
GPUS = (8, 64, 512)
TOKENS_PER_ROW = 929
"""729 vision and 200 text tokens, as ``benchmarks/real_shapes.py`` has them."""
PICTURE_BYTES = 100_000
"""Of a photograph; the pictures that ``overhead`` stored are small PNG."""
COLUMNS, FILES_PER_SHARD = 6, 3
"""``samples`` and the five fields of ``standard``; tar, index and commit."""
UPLOAD_PART = 50 << 20
"""Bytes of one part of a large upload."""


@dataclass(frozen=True)
class Costs:
    """What a row costs beside the teacher.

    Attributes:
        prepare_ms, write_ms: of one core: preparing; encoding, packing, writing, hashing. row_bytes: of all columns.
    """

    prepare_ms: float
    write_ms: float
    row_bytes: float


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Benchmark → its newest saved result."""
    found: dict[str, dict[str, Any]] = {}
    for path in folder.glob("*.json"):
        name, body = path.name.split("-")[0], json.loads(path.read_text())
        date = body["machine"]["date"] if isinstance(body, dict) and "machine" in body else ""
        if date and (name not in found or found[name]["machine"]["date"] <= date):
            found[name] = body
    return found


def costs(results: Mapping[str, dict[str, Any]]) -> Costs:
    """Out of the results of ``capture`` and ``overhead``."""
    inside = results["capture"]["ms_per_row_inside"]["standard"]
    write = sum(
        inside[name] for name in ("encode fields", "pack", "write", "hash + commit", "encode samples", "finite check")
    )
    stored = results["overhead"]["totals"]["standard, with samples"]["tar"]
    return Costs(inside["prepare (own thread)"], write, stored + PICTURE_BYTES)


def stage_table(scale: Mapping[str, Any]) -> str:
    """Seconds and peak memory of every stage by the number of rows."""
    sizes = scale["sizes"]
    header = ["stage", *(f"{int(rows):,} rows" for rows in sizes)]
    stages = [name for name in next(iter(sizes.values())) if name != "files"]
    lines = [
        [name, *(f"{one[name]['seconds']:.1f} s, {one[name]['mib']:.0f} MiB" for one in sizes.values())]
        for name in stages
    ]
    reading = {
        "open the cache to train": lambda one: f"{one['open_seconds']:.2f} s, {one['open_mib']:.0f} MiB more",
        "stream in training order": lambda one: f"{one['rows_per_second']:,.0f} rows/s",
        "loader at most": lambda one: f"{one['mib_at_most']:.0f} MiB ({one['mib_before']:.0f} before)",
    }
    lines += [[name, *(show(one["train side"]) for one in sizes.values())] for name, show in reading.items()]
    return table(header, lines)


def planned_table(planned: Mapping[str, Any]) -> str:
    size = f"json of {planned['rows']:,} rows, {planned['files']['json_bytes'] / 1e9:.2f} GB"
    stages = [(name, one) for name, one in planned.items() if isinstance(one, dict) and "mib" in one]
    return table(
        [size, "seconds", "peak, MiB"], [[name, f"{one['seconds']:.1f}", f"{one['mib']:.0f}"] for name, one in stages]
    )


def capture_table(cost: Costs, tokens_per_second: float, shards: int) -> str:
    """A capture on many GPUs, if the teacher is as fast as given."""
    header = ["", *(f"{gpus} GPUs" for _ in MIXTURES for gpus in GPUS)]
    lines: dict[str, list[str]] = {}
    for rows in MIXTURES.values():
        for gpus in GPUS:
            for name, value in one_capture(cost, tokens_per_second, shards, rows, gpus).items():
                lines.setdefault(name, []).append(value)
    first = ["rows", *(f"{rows:,}" for rows in MIXTURES.values() for _ in GPUS)]
    return table(header, [first, *([name, *values] for name, values in lines.items())])


def one_capture(cost: Costs, tokens_per_second: float, shards: int, rows: int, gpus: int) -> dict[str, str]:
    """The column of one job: GPUs work at the same time, each with ``rows / gpus`` rows, shards being whole."""
    busy = min(gpus, shards)
    waves = -(-shards // busy)
    seconds = waves * (rows / shards) * TOKENS_PER_ROW / tokens_per_second
    row_rate = tokens_per_second / TOKENS_PER_ROW  # of one GPU
    total_bytes = rows * cost.row_bytes
    tar_bytes = total_bytes / shards / COLUMNS
    requests = shards * COLUMNS * (FILES_PER_SHARD + int(tar_bytes // UPLOAD_PART))
    return {
        "teacher, minutes": f"{seconds / 60:.1f}",
        "cores a GPU, preparing": f"{row_rate * cost.prepare_ms / 1e3:.2f}",
        "cores a GPU, encoding and writing": f"{row_rate * cost.write_ms / 1e3:.2f}",
        "TB in all": f"{total_bytes / 1e12:.2f}",
        "MB/s written, all GPUs": f"{busy * row_rate * cost.row_bytes / 1e6:.0f}",
        "commits a second, mean": f"{shards * COLUMNS / seconds:.3f}",
        "requests a second, mean": f"{requests / seconds:.2f}",
        "shards a GPU": f"{shards / busy:.0f}",
        "work that a kill loses, GPU-minutes": f"{rows / shards / row_rate / 60:.1f}",
    }


def training_table(cost: Costs, samples_per_second: float) -> str:
    """What training asks of the store, if one GPU trains so many samples a second."""
    lines = []
    for gpus in GPUS:
        rate = gpus * samples_per_second
        lines.append([str(gpus), f"{rate:,.0f}", f"{rate * cost.row_bytes / 1e6:,.0f}", f"{rate * COLUMNS:,.0f}"])
    return table(["GPUs", "samples/s", "MB/s read", "range reads/s, one a column and row"], lines)


def print_tables(tokens_per_second: float, samples_per_second: float, folder: Path = RESULTS) -> None:
    """All tables, as Markdown; says which result is missing and how it is made."""
    results = read_results(folder)
    if missing := [name for name in ("scale", "executors", "capture", "overhead") if name not in results]:
        print("not measured yet: " + ", ".join(f"python -m benchmarks.{name} --save" for name in missing) + "\n")
    if scale := results.get("scale"):
        made = scale["machine"]
        print(f"{made['machine']}, {made['date']}, {scale['shards']} shards, {scale['workers']} workers\n")
        print(stage_table(scale), planned_table(scale["planned"]), sep="\n\n", end="\n\n")
    if "executors" in results:
        ratios = results["executors"]["ratios"]
        print(table(["ratio", "measured"], [[name, f"{value:.3f}"] for name, value in ratios.items()]) + "\n")
    if not {"capture", "overhead"} <= set(results):
        return
    cost = costs(results)
    print(
        f"if one GPU reads {tokens_per_second:,.0f} tokens a second (not measured), {TOKENS_PER_ROW} a row, 512 shards:\n"
    )
    print(capture_table(cost, tokens_per_second, 512))
    print(f"\nif one GPU trains {samples_per_second:g} samples a second (not measured):\n")
    print(training_table(cost, samples_per_second))
