"""Run cells side by side, each in a fresh process on its own device. One that fails does not stop the others."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pipelines
from pipelines.ablate.cards import FAILED
from pipelines.ablate.cell import CHOOSE, DISK, WHAT
from pipelines.ablate.cells import LOG, REQUEST, Cell, request
from pipelines.processes.spawned import GRACE_SECONDS
from pipelines.train.output_lock import NAME, Held, alone
from pipelines.train.run_records import write_record
from teacher_cache import stopping
from teacher_cache.errors import KdcliError, one_line

POLL_SECONDS = 0.1
LOOK_SECONDS = 1.0
STOPPED = {DISK, *(code for number in stopping.SIGNALS for code in (128 + number, -number))}
"""Exit statuses of a cell that somebody stopped, or a full disk: the next run goes on with it."""
OnEnd = Callable[[Cell, str], None]
"""(cell, its error or "") when a cell ends."""


@dataclass(frozen=True)
class Slot:
    """Where a cell runs. device: ``cpu`` or ``cuda:N``. threads: of a process on the CPU; 0: as torch likes."""

    device: str
    threads: int = 0

    def environment(self) -> dict[str, str]:
        """The child sees its own GPU alone, as ``cuda:0``, or none."""
        own = dict(os.environ)
        root = str(Path(pipelines.__file__).parents[1])
        own["PYTHONPATH"] = os.pathsep.join(filter(None, [root, own.get("PYTHONPATH", "")]))
        if self.device == "cpu":
            own["CUDA_VISIBLE_DEVICES"] = ""
        else:
            number = int(self.device.partition(":")[2] or 0)
            visible = [one for one in own.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
            own["CUDA_VISIBLE_DEVICES"] = visible[number] if visible else str(number)
        if self.threads:
            own["OMP_NUM_THREADS"] = str(self.threads)
        return own


def make_slots(devices: str | None, workers: int | None) -> list[Slot]:
    """``--devices cuda:0,cuda:1`` or ``--workers N`` (on the CPU, cores split); default: every GPU, else one worker on the CPU."""
    import torch

    count = torch.cuda.device_count()
    if devices and workers:
        raise KdcliError("--devices and --workers exclude each other: a device runs one cell at a time")
    if workers is not None and workers < 1:
        raise KdcliError(f"--workers must be at least 1, got {workers}")
    names = [one.strip() for one in (devices or "").split(",") if one.strip()]
    if not names and not workers and count:
        names = [f"cuda:{number}" for number in range(count)]
    for name in names:
        kind, _, number = name.partition(":")
        if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
            raise KdcliError(f"--devices {name}: write cpu or cuda:N, e.g. --devices cuda:0,cuda:1")
        if kind == "cuda" and int(number or 0) >= count:
            raise KdcliError(f"--devices {name}: this machine has {count} GPUs")
    names = names or ["cpu"] * (workers or 1)
    on_cpu = names.count("cpu")
    threads = max(1, len(os.sched_getaffinity(0)) // on_cpu) if on_cpu else 0
    return [Slot(name, threads if name == "cpu" else 0) for name in names]


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    slot: Slot


def run_cells(
    cells: Sequence[Cell],
    slots: Sequence[Slot],
    on_end: OnEnd,
    on_poll: Callable[[list[Cell]], None] = lambda cells: None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Run every cell. Whoever shares an unfinished stage with a running cell waits for it, and so does, with a line that says so, whoever
    finds that another process trains it: a child of an ablation that was killed takes its time to write a checkpoint.

    An interrupt and a signal (``stopping``) end the children too, each behind a checkpoint.
    """
    pending, free, running = list(cells), list(slots), list[_Running]()
    others = _Others(say)
    with stopping.listening():
        try:
            while pending or running:
                while free and (cell := _next(pending, running, others)):
                    pending.remove(cell)
                    slot = free.pop(0)
                    running.append(_Running(cell, start(cell, slot), slot))
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    _let_go(one.process)
                    free.append(one.slot)
                    on_end(one.cell, conclude(one.cell, one.process.returncode))
                on_poll([one.cell for one in running])
                time.sleep(POLL_SECONDS)
        finally:
            stop([one.process for one in running])


class _Others:
    """Stages that other processes train; each is looked at once a second at most, and told of once."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self._seen: dict[Path, tuple[float, str]] = {}

    def train(self, stage: Path) -> bool:
        looked, before = self._seen.get(stage, (-math.inf, ""))
        if time.monotonic() - looked < LOOK_SECONDS:
            return bool(before)
        word = self._holder(stage)
        if word and not before:
            self.say(f"waiting: {word}")
        self._seen[stage] = (time.monotonic(), word)
        return bool(word)

    def _holder(self, stage: Path) -> str:
        if not (stage / NAME).is_file():
            return ""
        try:
            with alone(stage, WHAT, CHOOSE, self.say):
                return ""
        except Held as error:
            return one_line(error)


def _next(pending: Sequence[Cell], running: Sequence[_Running], others: _Others) -> Cell | None:
    """The first cell none of whose unfinished stages is being trained."""
    busy = {folder for one in running for folder in unfinished(one.cell)}
    return next(
        (cell for cell in pending if not any(one in busy or others.train(one) for one in unfinished(cell))), None
    )


def unfinished(cell: Cell) -> list[Path]:
    return [one for one in cell.stage_folders() if not (one / "done.json").is_file()]


def start(cell: Cell, slot: Slot) -> subprocess.Popen[bytes]:
    """A process of its own session: an interrupt at the terminal reaches this program alone, which then ends its children."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / FAILED).unlink(missing_ok=True)
    write_record(cell.folder / REQUEST, request(cell))
    command = [sys.executable, "-P", "-m", "pipelines.ablate.cell", str(cell.folder / REQUEST)]
    with (cell.folder / LOG).open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # it ends with this process: the child then ends, too
            stdout=log,
            stderr=subprocess.STDOUT,
            env=slot.environment(),
            start_new_session=True,
        )


def conclude(cell: Cell, status: int) -> str:
    """ "" for a finished cell; else its error, also kept as ``failed.json`` where it is the cell's own."""
    if status == 0 and not cell.missing() and cell.card():
        return ""
    log = cell.folder / LOG
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = lines[-1].strip() if lines else "it said nothing"
    if status in STOPPED:
        return said
    error = said if status > 0 else f"ended by signal {-status} after: {said}" if status else f"left no result: {said}"
    write_record(cell.folder / FAILED, {"error": error.removeprefix("Error: "), "status": status, "log": str(log)})
    return error.removeprefix("Error: ")


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End children; what their last checkpoints hold is not lost."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its loader processes, too
            process.wait()
        _let_go(process)


def _let_go(process: subprocess.Popen[bytes]) -> None:
    if process.stdin:
        process.stdin.close()


def prune_models(cells: Sequence[Cell]) -> None:
    """Remove the models of stages that no unfinished cell starts from."""
    needed: Mapping[Path, None] = {
        folder: None for cell in cells if cell.state() != "done" for folder in cell.stage_folders()
    }
    for folder in {folder for cell in cells for folder in cell.stage_folders()} - set(needed):
        shutil.rmtree(folder / "model", ignore_errors=True)
