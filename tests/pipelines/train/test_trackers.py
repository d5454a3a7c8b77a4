"""Trackers: TensorBoard read back, wandb and Trackio offline where they are installed, resumed runs, and what fails beside a training."""

from __future__ import annotations

import json
import re
import sqlite3
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.settings import Settings, load_settings
from pipelines.train import trackers
from pipelines.train.trackers import TrackedStage, check_trackers, open_trackers
from pipelines.train.train_student import train
from student_train.config import TrainSettings
from teacher_cache.errors import KdcliError


def stage(folder: Path, first_step: int = 0, identity: str = "a") -> TrackedStage:
    folder.mkdir(parents=True, exist_ok=True)
    return TrackedStage(folder, first_step, identity, {"settings": {"seed": 3, "parts": ["sft"]}})


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(one.step, one.value) for one in events.Scalars(name)]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("tensorboard", ("tensorboard",)),
        ("wandb, trackio,wandb", ("wandb", "trackio")),
        (("tensorboard", "wandb"), ("tensorboard", "wandb")),
        ("none", ()),
        ("", ()),
        ((), ()),
    ],
)
def test_a_list_of_trackers(given: Any, names: tuple[str, ...]) -> None:
    assert TrainSettings(report_to=given).trackers() == names


@pytest.mark.parametrize(
    ("given", "said"),
    [('"mlflow,wandb"', "got mlflow"), ('["none", "wandb"]', "none must be the only one"), ("3", "report_to")],
)
def test_other_names_are_refused_where_they_are_read(tmp_path: Path, given: str, said: str) -> None:
    (tmp_path / "kd.toml").write_text(f"[train]\nreport_to = {given}\n")
    with pytest.raises(KdcliError, match=said):
        load_settings(tmp_path / "kd.toml")


def test_a_missing_package_names_its_extra_before_anything_loads(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    settings = Settings(train=TrainSettings("no/such/student", str(tmp_path / "run"), report_to="tensorboard,wandb"))
    with pytest.raises(KdcliError, match=re.escape("pip install 'kdcli[wandb]'")):
        train(str(tiny_cache), "sft", settings, "DFT")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_old_runs_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackers_of_old").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KdcliError, match="the package trackers_of_old is missing"):
        check_trackers(["trackers_of_old"])


def test_a_resumed_training_has_every_step_once(tiny_cache: Path, tiny_student: Path, tmp_path: Path) -> None:
    """Stopped behind its third step, it goes on from the checkpoint of the second."""
    given = TrainSettings(str(tiny_student), str(tmp_path / "run"), 2, max_steps=4, save_steps=2)
    seen: list[str] = []

    def stop(name: str, step: int, steps: int, result: Any) -> None:
        if step == 2 and not seen:
            seen.append(name)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(str(tiny_cache), "sft", Settings(train=given), "DFT", on_step=stop)
    train(str(tiny_cache), "sft", Settings(train=given), "DFT", on_step=stop)
    folder = tmp_path / "run" / "01-DFT"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in lines] == [0, 1, 2, 3]
    assert scalars(folder / "tensorboard", "train/loss") == [(one["step"], pytest.approx(one["loss"])) for one in lines]


class Board(trackers.Backend):
    """A service that keeps its steps in memory, by run, and goes away at step ``breaks``."""

    replaces = False
    runs: dict[str, list[int]]
    breaks = -1

    def __init__(self, stage: TrackedStage, run: str):
        self.steps = self.runs.setdefault(run, [])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        print("a tracker's own words")
        if step == self.breaks:
            raise ConnectionError("the service\nis away")
        self.steps.append(step)

    def finish(self) -> None:
        pass


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> type[Board]:
    monkeypatch.setattr(Board, "runs", {}, raising=False)
    monkeypatch.setitem(trackers.BACKENDS, "board", Board)
    return Board


def log_steps(folder: Path, first: int, last: int, identity: str = "a") -> list[str]:
    said: list[str] = []
    (one,) = open_trackers(["board"], stage(folder, first, identity), said.append)
    for step in range(first, last):
        one.log(step, {"loss": 1.0})
    one.finish()
    return said


def test_a_run_is_gone_on_with_and_no_step_comes_twice(board: type[Board], tmp_path: Path, capsys: Any) -> None:
    assert log_steps(tmp_path, 0, 5) == log_steps(tmp_path, 3, 8) == []
    assert list(board.runs.values()) == [list(range(8))]
    log_steps(tmp_path, 0, 2, identity="b")  # another stage in the same folder
    assert list(board.runs.values()) == [list(range(8)), [0, 1]]
    assert capsys.readouterr().out == "", "stdout is the command's own"


def test_a_tracker_that_fails_is_one_note(board: type[Board], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Board, "breaks", 2)
    (said,) = log_steps(tmp_path / "one", 0, 5)
    assert said.startswith("note: board failed, training continues without it") and "the service is away" in said
    assert list(board.runs.values()) == [[0, 1]]
    folder = tmp_path / "two"
    stage(folder)
    (folder / "tensorboard").write_text("a file stands where its folder would be")
    notes: list[str] = []
    (one,) = open_trackers(["tensorboard"], stage(folder), notes.append)
    one.log(0, {"loss": 1.0})
    one.finish()
    assert len(notes) == 1 and "\n" not in notes[0]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first in (0, 2):
        said: list[str] = []
        (one,) = open_trackers(["wandb"], stage(tmp_path / "run" / "01-DFT", first), said.append)
        for step in range(first, first + 3):
            one.log(step, {"loss": 1.0 / (step + 1)})
        one.finish()
        assert not said
    files = list((tmp_path / "run" / "01-DFT" / "wandb").glob("offline-run-*/run-*.wandb"))
    known = json.loads((tmp_path / "run" / "01-DFT" / "trackers.json").read_text())["wandb"]
    assert len(files) == 2 and {file.stem for file in files} == {f"run-{known['run']}"}
    assert known["next_step"] == 5


def test_trackio_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    for first in (0, 2):
        said: list[str] = []
        (one,) = open_trackers(["trackio"], stage(tmp_path / "run" / "01-DFT", first), said.append)
        for step in range(first, first + 3):
            one.log(step, {"loss": 1.0 / (step + 1)})
        one.finish()
        assert not said
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        steps = database.execute("select run_name, step from metrics order by step").fetchall()
    assert [step for _, step in steps] == [0, 1, 2, 3, 4] and len({run for run, _ in steps}) == 1
