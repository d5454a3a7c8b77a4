"""What a step did, and where it is written down: ``metrics.jsonl``, and trackers that a run brings along."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from student_train.distributed import Processes


@dataclass
class StepResult:
    """What one optimizer step did, over all processes: the loss, its terms (unweighted means), and the cost."""

    loss: float
    terms: dict[str, float]
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float = 0.0

    def values(self) -> dict[str, float]:
        """Every number by name."""
        return {
            "loss": self.loss,
            **{f"loss/{name}": value for name, value in self.terms.items()},
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 4),
        }


class Tracker(Protocol):
    """Where metrics go besides the file. It raises nothing: what goes wrong in it is its own."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def finish(self) -> None: ...


OpenTrackers = Callable[[int], Sequence[Tracker]]
"""First step of this start (0, or that of the checkpoint) → trackers."""


def _step_of(line: str, other: int) -> int:
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
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = path.read_text().splitlines() if path.is_file() else []
        lines = [line for line in kept if _step_of(line, first_step) < first_step]
        draft = folder / ".metrics.jsonl"
        draft.write_text("".join(f"{line}\n" for line in lines))
        os.replace(draft, path)
        self.file = path.open("a")
        self.trackers = open_trackers(first_step)

    def write(self, step: int, result: StepResult) -> None:
        if not self.file or step % self.every:
            return
        values = result.values()
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for tracker in self.trackers:
            tracker.log(step, values)

    def close(self) -> None:
        if self.file:
            self.file.close()
        for tracker in self.trackers:
            tracker.finish()
