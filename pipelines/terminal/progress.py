"""Progress bars of the long commands: done, rate, time left; a line now and then where no terminal sees them."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from teacher_cache.errors import printable


def rate_of(task: Any, from_start: bool) -> float | None:
    """Items a second: lately, or since the task began, where a burst of them says nothing. None: not known."""
    if not from_start:
        return task.finished_speed or task.speed  # type: ignore[no-any-return]
    seconds = task.finished_time or task.elapsed
    return task.completed / seconds if seconds and task.completed else None


class Rate(ProgressColumn):
    """Items a second, as ``rate_of`` has them."""

    def __init__(self, unit: str, from_start: bool = False):
        super().__init__()
        self.unit, self.from_start = unit, from_start

    def render(self, task: Any) -> Text:
        rate = rate_of(task, self.from_start)
        return Text(f"{rate:.1f} {self.unit}/s" if rate else f"– {self.unit}/s")


EVERY_S = 30.0
"""Seconds between two lines of one bar in a log file."""


class Lines(Progress):
    """The bars of a log file: a line of each every ``EVERY_S`` seconds while it moves, and one of where it ended."""

    def __init__(self, *columns: ProgressColumn, console: Console, unit: str, from_start: bool = False):
        super().__init__(*columns, console=console, disable=True)
        self.unit, self.from_start = unit, from_start
        self.told: dict[Any, tuple[float, float]] = {}  # task → when, and how far it was

    def add_task(self, *arguments: Any, **named: Any) -> Any:
        task = super().add_task(*arguments, **named)
        self.told[task] = (time.monotonic(), 0.0)
        return task

    def update(self, task_id: Any, **named: Any) -> None:
        super().update(task_id, **named)
        self._maybe_tell(task_id)

    def advance(self, task_id: Any, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._maybe_tell(task_id)

    def stop(self) -> None:
        super().stop()
        for task in self.tasks:
            if task.completed != self.told[task.id][1]:
                self._tell(task.id)

    def _maybe_tell(self, task_id: Any) -> None:
        if time.monotonic() - self.told[task_id][0] >= EVERY_S:
            self._tell(task_id)

    def _tell(self, task_id: Any) -> None:
        task = next(one for one in self.tasks if one.id == task_id)
        self.told[task_id] = (time.monotonic(), task.completed)
        total = f"/{task.total:.0f}" if task.total is not None else ""
        speed = rate_of(task, self.from_start)
        rate = f", {speed:.1f} {self.unit}/s" if speed else ""
        seconds = task.time_remaining
        left = f", {int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02} left" if seconds else ""
        line = f"{task.description}: {task.completed:.0f}{total} {self.unit}{rate}{left}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def quiet_library_bars() -> None:
    """No loading bars of transformers from here on."""
    if "huggingface_hub" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()
    else:  # it is seconds to import, and not every command comes to need it
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def bar(console: Console, unit: str, from_start: bool = False) -> Progress:
    """A bar that owns the terminal: the library's own loading bars would tear it. In a log file, ``Lines``.

    from_start: as ``rate_of`` takes it.
    """
    quiet_library_bars()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),  # part names are the user's own, brackets and all
        BarColumn(),
        MofNCompleteColumn(),
        Rate(unit, from_start),
        TimeRemainingColumn(),
    )
    if not console.is_terminal:
        return Lines(*columns, console=console, unit=unit, from_start=from_start)
    return Progress(*columns, console=console)


@contextmanager
def capture_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """``progress(event, done, total)`` for ``pipelines.capture.cache_teacher.capture``."""
    with bar(console, "rows") as progress:
        task = progress.add_task("planning", total=None)

        def show(event: str, done: int, total: int) -> None:
            waits = ", the teacher waits for encoding" if event == "waiting" else ""
            progress.update(task, description=f"capturing{waits}", completed=done, total=total)

        yield show


class TrainSpeed:
    """What the last steps of a stage cost: tokens a second, shares of padding and of time that the main process waited for data."""

    def __init__(self, steps: int = 20):
        self.kept: deque[tuple[float, ...]] = deque(maxlen=steps)

    def after(self, result: Any) -> str:
        """With one step more (a ``StepResult``), as a line."""
        self.kept.append((result.tokens, result.places, result.seconds, result.data_seconds))
        tokens, places, seconds, waited = map(sum, zip(*self.kept))
        spent = seconds + waited
        parts = [f"{tokens / spent:,.0f} tokens/s"] if spent else []
        parts += [f"{100 * (1 - tokens / places):.0f} % padding"] if places else []
        parts += [f"{100 * waited / spent:.0f} % waiting"] if spent and 100 * waited / spent >= 1 else []
        return ", ".join(parts)


@contextmanager
def train_progress(console: Console) -> Iterator[Callable[[str, int, int, Any], None]]:
    """``on_step(stage folder, step, steps, result)`` for ``pipelines.train.train_student.train``: one bar a stage."""
    if int(os.environ.get("RANK", "0")):
        yield lambda stage, step, steps, result: None  # under torchrun the first process shows the bar
        return
    with bar(console, "steps") as progress:
        tasks: dict[str, Any] = {}
        speeds: dict[str, TrainSpeed] = {}

        def show(stage: str, step: int, steps: int, result: Any) -> None:
            if stage not in tasks:
                tasks[stage], speeds[stage] = progress.add_task(stage, total=steps, completed=step), TrainSpeed()
            described = f"{stage} loss {result.loss:.3f}, {speeds[stage].after(result)}"
            progress.update(tasks[stage], completed=step + 1, description=described)

        yield show


@contextmanager
def doctor_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """``progress(part, done, total)`` for ``pipelines.judge.doctor.examine``: one bar a part, which begins with ``done`` 0.

    Groups of rows come in bursts, several at once, so rates are of the whole.
    """
    with bar(console, "rows", from_start=True) as progress:
        tasks: list[Any] = []  # parts may have one name

        def show(part: str, done: int, total: int) -> None:
            if not done:
                tasks.append(progress.add_task(printable(part), total=total))
            progress.update(tasks[-1], completed=done)

        yield show
