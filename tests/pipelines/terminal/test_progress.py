"""Bars in a log file: whole lines, now and then, and where each ended; in a terminal, bars."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipelines.terminal import progress
from pipelines.terminal.progress import Lines, TrainSpeed, bar, doctor_progress, train_progress
from student_train.metrics_log import StepResult


def log_file() -> Console:
    return Console(file=io.StringIO(), width=60)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_gets_the_end_as_one_line() -> None:
    console = log_file()
    with bar(console, "rows") as shown:
        task = shown.add_task("[caption] a part with brackets", total=400)
        shown.update(task, completed=0)  # nothing has moved since: no line
        for _ in range(400):
            shown.advance(task)
    (line,) = text(console).splitlines()
    assert line.startswith("[caption] a part with brackets: 400/400 rows, ") and line.endswith(" rows/s")
    assert "\x1b" not in text(console) and "━" not in text(console)


def test_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    console, clock = log_file(), [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Lines(console=console, unit="steps") as shown:
        shown.get_time = lambda: clock[0]
        task = shown.add_task("01-DFT", total=100)
        for step in range(100):
            clock[0] += 1.0
            shown.update(task, completed=step + 1)
    lines = text(console).splitlines()
    assert [line.split(",")[0] for line in lines] == [f"01-DFT: {done}/100 steps" for done in (30, 60, 90, 100)]
    assert lines[0] == "01-DFT: 30/100 steps, 1.0 steps/s, 0:01:10 left"


def test_what_was_not_counted_is_not_made_up() -> None:
    console = log_file()
    with bar(console, "rows") as shown:
        shown.update(shown.add_task("planning", total=None), completed=7)
    assert text(console) == "planning: 7 rows\n"


def test_a_training_into_a_log() -> None:
    console = log_file()
    with train_progress(console) as on_step:
        for step in range(3):
            on_step("01-DFT", step, 3, step_of(1.5 - step))
    (line,) = text(console).splitlines()
    assert line.startswith("01-DFT loss -0.500, 400 tokens/s, 25 % padding, 33 % waiting: 3/3 steps")


def step_of(loss: float, **named: float) -> StepResult:
    return StepResult(loss, {}, **{"tokens": 300, "places": 400, "seconds": 0.5, "data_seconds": 0.25, **named})


def test_a_training_s_speed_is_that_of_the_last_steps() -> None:
    speed = TrainSpeed(steps=2)
    assert speed.after(step_of(1.0, seconds=0.0, data_seconds=0.0)) == "25 % padding"
    assert speed.after(step_of(1.0, places=300)) == "800 tokens/s, 14 % padding, 33 % waiting"
    assert speed.after(step_of(1.0, places=300, data_seconds=0.0)) == "480 tokens/s, 0 % padding, 20 % waiting"


def test_a_terminal_has_bars() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    assert not isinstance(bar(console, "rows"), Lines)


def test_a_doctor_s_rate_is_that_of_the_whole_part() -> None:
    """Groups come in bursts, 400 rows within a blink; two parts of one name have a bar each."""
    clock = [1000.0]
    console = Console(file=io.StringIO(), width=60, get_time=lambda: clock[0])
    with doctor_progress(console) as show:
        for total in (400, 100):
            show("sft", 0, total)
            clock[0] += 4.0
            for done in range(100, total + 1, 100):
                show("sft", done, total)
                clock[0] += 1e-6
    assert text(console).splitlines() == ["sft: 400/400 rows, 100.0 rows/s", "sft: 100/100 rows, 25.0 rows/s"]
