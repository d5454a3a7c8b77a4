"""What an optimizer step did, and where it is written down: ``metrics.jsonl`` and TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from student_train.config import TrainSettings
from student_train.distributed import Processes
from student_train.stream import TrainBatch
from teacher_cache.records import ImageLayout

SIZES = ("tokens", "samples", "images", "vision_tokens", "cached_vision_tokens")
"""Of a step's rows, as they are logged."""


@dataclass
class StepResult:
    """What one optimizer step did, over all processes: the loss, its terms (unweighted means), and the cost.

    Attributes:
        vision_tokens: that the student read; cached_vision_tokens: that the teacher read of the same images.
        seconds: in the step; data_seconds: that the main process waited for the step's rows before it.
        peak_memory_bytes: the most that torch held on the main process's GPU so far; None on a CPU.
    """

    loss: float
    terms: dict[str, float]
    grad_norm: float
    learning_rate: float
    tokens: int
    samples: int = 0
    images: int = 0
    vision_tokens: int = 0
    cached_vision_tokens: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    peak_memory_bytes: int | None = None


def read_sizes(batches: Sequence[TrainBatch]) -> dict[str, int]:
    """What micro-batches hold, by the names that ``StepResult`` has for it; padding does not count."""

    def images(layouts: Sequence[Sequence[ImageLayout]]) -> list[ImageLayout]:
        return [image for row in layouts for image in row]

    ours = [image for one in batches for image in images(one.student_layouts)]
    theirs = [image for one in batches for image in images(one.layouts)]
    return {
        "tokens": sum(int(one.batch.inputs["attention_mask"].sum()) for one in batches),
        "samples": sum(len(one.batch.keys) for one in batches),
        "images": len(ours),
        "vision_tokens": sum(image.tokens() for image in ours),
        "cached_vision_tokens": sum(image.tokens() for image in theirs),
    }


def peak_memory(device: torch.device) -> int | None:
    """Bytes that torch held at most on this GPU since the process began; None on a CPU, where nobody counts them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _step_of(line: str, other: int) -> int:
    """The step of a line of metrics; ``other`` where it is none (half written, or damaged): it is dropped."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return other


class MetricsLog:
    """``metrics.jsonl`` (one line a logged step) and TensorBoard, from the main process; a resumed run drops the lines it redoes."""

    def __init__(self, folder: Path, first_step: int, settings: TrainSettings, processes: Processes):
        self.every = settings.logging_steps if processes.is_main else 0
        self.file, self.board = None, None
        if not processes.is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = path.read_text().splitlines() if path.is_file() else []
        lines = [line for line in kept if _step_of(line, first_step) < first_step]
        draft = folder / ".metrics.jsonl"
        draft.write_text("".join(f"{line}\n" for line in lines))
        os.replace(draft, path)
        self.file = path.open("a")
        if settings.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, result: StepResult) -> None:
        if not self.file or step % self.every:
            return
        body = {
            "step": step,
            "loss": result.loss,
            **{f"loss/{name}": value for name, value in result.terms.items()},
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            **{name: getattr(result, name) for name in SIZES},
            "seconds": round(result.seconds, 4),
            "data_seconds": round(result.data_seconds, 4),
        }
        if result.peak_memory_bytes is not None:
            body["peak_memory_bytes"] = result.peak_memory_bytes
        self.file.write(json.dumps(body) + "\n")
        self.file.flush()
        if self.board:
            for name, value in body.items():
                if name != "step":
                    self.board.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        if self.file:
            self.file.close()
        if self.board:
            self.board.close()
