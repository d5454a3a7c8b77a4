"""What every benchmark needs: interleaved repeats, a description of the machine, a table, one JSON line, a saved file."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.regressions import slower

DEMO_MODELS = Path(__file__).parent.parent / "pipelines" / "demo" / "assets"
RESULTS = Path(__file__).parent / "results"


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shapes", choices=("demo", "real"), default="demo", help="demo models, or 7B → 0.5B shapes")
    parser.add_argument(
        "--layers", type=int, default=None, help="with --shapes real: layers of every tower (a dry run)"
    )
    parser.add_argument(
        "--models", default=str(DEMO_MODELS), help="with --shapes demo: folder of teacher/ and student_start/"
    )
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats; medians are reported")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<name>-<machine>.json")
    return parser


def interleave(variants: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every variant, A B C A B C …, so that a slow minute of the machine falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            seconds[name].append(run())
    return seconds


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios inside each repeat."""
    return statistics.median(a / b for a, b in zip(above, below))


def spread(values: Sequence[float]) -> list[float]:
    """[smallest, median, largest], to six digits."""
    return [float(f"{value:.6g}") for value in (min(values), statistics.median(values), max(values))]


def timed(run: Callable[[], Any], device: str) -> float:
    """Wall seconds of ``run`` with the device idle before and after."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def clocked(run: Callable[[], Any], device: str) -> float:
    """Seconds: of the GPU's wall clock, or of this process's processor time."""
    if device.startswith("cuda"):
        return timed(run, device)
    started = time.process_time()
    run()
    return time.process_time() - started


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def machine(device: str) -> dict[str, Any]:
    """What a reader must know to compare: processor, threads, library versions, date; no host name."""
    import transformers

    cores = len(os.sched_getaffinity(0))
    accelerator = torch.cuda.get_device_name(0) if device.startswith("cuda") else "CPU"
    return {
        "machine": f"{cores}-core {processor_name()}, {accelerator}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def processor_name() -> str:
    """``AMD EPYC`` and the like, as the kernel tells it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return (found.group(1).strip() if found else platform.processor()) or platform.machine()


def finish(name: str, body: dict[str, Any], save: bool) -> None:
    """The last line of every benchmark: one JSON object; with ``--save`` also a file. Before it, what became slower than the saved one."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{body['machine']['machine']} {body['shapes']}".lower()).strip("-")
    saved = RESULTS / f"{name}-{slug}.json"
    worse = slower(name, body, json.loads(saved.read_text())) if saved.is_file() else []
    for line in worse:
        print(line)
    if save:
        RESULTS.mkdir(exist_ok=True)
        saved.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps({"benchmark": name, **body, "slower": worse}))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns by width; numbers right, the first column left."""
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        print("  ".join(cells))
