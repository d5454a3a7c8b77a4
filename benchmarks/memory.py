"""Peak memory of a piece of work: in a process of its own, from what lay there before."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import timed


def peak_memory(work: Callable[[], Any], device: str) -> tuple[float, float, float]:
    """(MiB before, MiB at the peak, wall seconds); of the GPU's allocator, or of this process."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        seconds = timed(work, device)
        return before, torch.cuda.max_memory_allocated() / 2**20, seconds
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here
    seconds = timed(work, device)
    return before, resident("VmHWM"), seconds


def resident(entry: str) -> float:
    """MiB of this process as Linux counts them (``ru_maxrss`` would begin with the parent's own peak)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) / 1024


def in_subprocess(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON object that a benchmark prints last, run again with other arguments in a process of its own."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return json.loads(done.stdout.splitlines()[-1])
