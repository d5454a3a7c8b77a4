"""Peak memory of a piece of work: in a process of its own, from what lay there before."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Watched:
    """What a command took, with the processes that it started.

    Attributes:
        seconds: of the wall clock. largest_mib: peak of its largest process. together_mib: sum of all processes' peaks.
    """

    output: str
    seconds: float
    largest_mib: float
    together_mib: float


def watched(command: Sequence[str], interval: float = 0.1) -> Watched:
    """Run a command to its end; CalledProcessError where it fails. Peaks are looked at every ``interval`` seconds."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, text=True, cwd=Path(__file__).parent.parent)
        peaks: dict[int, float] = {}
        while process.poll() is None:
            peaks |= {pid: max(peaks.get(pid, 0.0), peak_of(pid)) for pid in with_children(process.pid)}
            time.sleep(interval)
        seconds = time.perf_counter() - started
        said.seek(0)
        output = said.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output)
    return Watched(output, seconds, max(peaks.values(), default=0.0), sum(peaks.values()))


def with_children(pid: int) -> list[int]:
    """A process and those below it, as far as they are still there."""
    found = [pid]
    for one in found:
        with suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def peak_of(pid: int) -> float:
    """MiB at the peak since the process's program was started (``ru_maxrss`` would begin with its parent's)."""
    with suppress(OSError, ValueError):
        (line,) = (one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return 0.0  # it is gone
