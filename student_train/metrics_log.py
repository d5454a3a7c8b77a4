"""What a step did, and where it is written down: ``metrics.jsonl``, and trackers that a run brings along."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from student_train.dataset import TrainBatch
from student_train.distributed import Processes
from teacher_cache import stopping
from teacher_cache.errors import KdcliError
from teacher_cache.records import ImageLayout
from teacher_cache.whole_file import naming_file, write_whole

SIZES = ("tokens", "places", "samples", "images", "vision_tokens", "cached_vision_tokens")
"""Of a step's rows, as they are logged."""


@dataclass
class StepResult:
    """What one optimizer step did, over all processes: the loss, its terms (unweighted means), and the cost.

    Attributes:
        places: tokens with padding. vision_tokens: that the student read; cached_vision_tokens: that the teacher read of the same images.
        seconds: in the step; data_seconds: that the main process waited for the step's rows before it.
        weights: of terms that have a schedule. kept: of terms that select, the mean weight of the step's rows.
        gradients: norms and cosines of the terms' gradients, in the steps that were asked for.
        refused: rows that were left out, since the student's processor does not take them; logged where there are any.
        left_out: a line for each of them that this process met.
        peak_memory_bytes: the most that torch held on the main process's GPU so far; None on a CPU.
    """

    loss: float
    terms: dict[str, float]
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    tokens: int = 0
    places: int = 0
    samples: int = 0
    images: int = 0
    vision_tokens: int = 0
    cached_vision_tokens: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    peak_memory_bytes: int | None = None
    refused: int = 0
    weights: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = field(default=(), init=False)

    def values(self) -> dict[str, float]:
        """Every number by name."""
        memory = {} if self.peak_memory_bytes is None else {"peak_memory_bytes": self.peak_memory_bytes}
        return {
            "loss": self.loss,
            **{f"loss/{name}": value for name, value in self.terms.items()},
            **{f"weight/{name}": value for name, value in self.weights.items()},
            **{f"kept/{name}": value for name, value in self.kept.items()},
            **self.gradients,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            **{name: getattr(self, name) for name in SIZES},
            "seconds": round(self.seconds, 4),
            "data_seconds": round(self.data_seconds, 4),
            **memory,
            **({"refused": self.refused} if self.refused else {}),
        }


def summed_result(
    batches: Sequence[TrainBatch], loss: float, shares: Mapping[str, float], processes: Processes
) -> tuple[StepResult, bool]:
    """What all processes did in a step, and whether one of them was asked to stop.

    Args:
        loss, shares: what this process's micro-batches gave to the loss and to each term.
    """
    sizes = read_sizes([one for one in batches if not one.filler])
    left_out = tuple(line for one in batches for line in one.refused)
    mine = [loss, float(stopping.asked() > 0), float(len(left_out)), *map(float, sizes.values()), *shares.values()]
    loss_all, asked, refused, *others = processes.sum(mine)
    summed: dict[str, Any] = dict(zip(sizes, map(int, others)))
    result = StepResult(loss_all, dict(zip(shares, others[len(sizes) :])), refused=round(refused), **summed)
    result.left_out = left_out
    return result, asked > 0


def read_sizes(batches: Sequence[TrainBatch]) -> dict[str, int]:
    """What micro-batches hold, by the names that ``StepResult`` has for it; padding does not count."""

    def images(layouts: Sequence[Sequence[ImageLayout]]) -> list[ImageLayout]:
        return [image for row in layouts for image in row]

    ours = [image for one in batches for image in images(one.student_layouts)]
    theirs = [image for one in batches for image in images(one.layouts)]
    return {
        "tokens": sum(count for one in batches for _, count in one.batch.spans),
        "places": sum(one.batch.inputs["input_ids"].numel() for one in batches),
        "samples": sum(len(one.batch.keys) for one in batches),
        "images": len(ours),
        "vision_tokens": sum(image.tokens() for image in ours),
        "cached_vision_tokens": sum(image.tokens() for image in theirs),
    }


def peak_memory(device: torch.device) -> int | None:
    """Bytes that torch held at most on this GPU since the process began; None on a CPU, where nobody counts them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


class Tracker(Protocol):
    """Where metrics go besides the file. It raises nothing: what goes wrong in it is its own."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def finish(self) -> None: ...


OpenTrackers = Callable[[int], Sequence[Tracker]]
"""First step of this start (0, or that of the checkpoint) → trackers."""


def _step_of(line: bytes | str, other: int) -> int:
    """The step of a line of metrics; ``other`` where it is none (half written, or damaged): it is dropped."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return other


class MetricsLog:
    """``metrics.jsonl`` (one line a logged step) and trackers, from the main process; a resumed run drops the lines it redoes."""

    def __init__(self, folder: Path, first_step: int, every: int, processes: Processes, open_trackers: OpenTrackers):
        self.every, self.file = every, None
        self.trackers: Sequence[Tracker] = ()
        if not processes.is_main:
            return
        path = self.path = folder / "metrics.jsonl"
        if path.exists() and not path.is_file():
            raise KdcliError(f"{path} is not a file: remove it, and run the same command again")
        kept = path.read_bytes().split(b"\n") if path.is_file() else []
        write_whole(path, b"".join(line + b"\n" for line in kept if _step_of(line, first_step) < first_step))
        self.file = path.open("ab")
        self.trackers = open_trackers(first_step)

    def write(self, step: int, result: StepResult) -> None:
        if not self.file or (step % self.every and not result.gradients):
            return
        values = result.values()
        with naming_file(self.path):
            self.file.write(json.dumps({"step": step, **values}).encode() + b"\n")
            self.file.flush()
        for tracker in self.trackers:
            tracker.log(step, values)

    def close(self) -> None:
        if self.file:
            with naming_file(self.path):
                self.file.close()
        for tracker in self.trackers:
            tracker.finish()
