"""Ablations that are killed, damaged, or started twice: nothing trains on, nothing blocks, and whoever waits says for whom."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from pipelines.ablate.cards import FAILED, read_card
from pipelines.ablate.cell import DISK, claim, run_cell
from pipelines.ablate.cells import Cell, make_cells, request
from pipelines.ablate.grid import load_grid
from pipelines.ablate.results import as_json, markdown
from pipelines.ablate.run import AblateRequest, ablate, ended_line, write_results
from pipelines.ablate.runner import _next, _Others, conclude
from pipelines.train.output_lock import Held
from student_train.checkpoint import checkpoints
from tests.odd_json import odd_documents
from tests.pipelines.report.conftest import result

KDCLI = str(Path(sys.executable).with_name("kdcli"))
ONE = """
[grid]
method = "sft"
stages = "SFT"
"""
HOLD = (
    "import sys, time; from pathlib import Path; from pipelines.train.output_lock import alone\n"
    "with alone(Path(sys.argv[1]), 'kdcli ablate', '--out'):\n"
    "    print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def grid(write_grid: Callable[..., Path]) -> Path:
    return write_grid(ONE)


@pytest.fixture
def cell(grid: Path, tmp_path: Path) -> Cell:
    return the_cell(grid, tmp_path / "out")


def the_cell(grid: Path, out: Path) -> Cell:
    (cell,) = make_cells(load_grid(grid), out)
    return cell


def done_cell(grid: Path, out: Path) -> Cell:
    """Trained and asked in this process."""
    cell = the_cell(grid, out)
    cell.folder.mkdir(parents=True, exist_ok=True)
    run_cell(cell.folder, json.loads(json.dumps(request(cell))))
    return cell


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of a folder."""
    line = [sys.executable, "-P", "-c", HOLD, str(folder)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(number: int) -> list[int]:
    told = subprocess.run(["ps", "-o", "pid=", "--ppid", str(number)], capture_output=True, text=True, check=False)
    return [int(one) for one in told.stdout.split()]


def family(number: int) -> list[int]:
    """Children of a process, and theirs."""
    return [one for child in children(number) for one in (child, *family(child))]


@pytest.mark.exhaustive  # test_ablate.py interrupts one
def test_the_children_of_a_killed_ablation_end_behind_a_checkpoint(grid: Path, tmp_path: Path) -> None:
    """SIGKILL to the command alone: the student's process and those that load its rows are gone; the next run is not blocked."""
    text = grid.read_text().replace(
        "max_steps = 1\n", "max_steps = 4000\nsave_steps = 100000\ndataloader_num_workers = 1\n"
    )
    grid.write_text(text)
    out = tmp_path / "out"
    log = the_cell(grid, out).stage_folders()[0] / "metrics.jsonl"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    line = [KDCLI, "ablate", str(grid), "--out", str(out), "--workers", "1"]
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    numbers: list[int] = []
    try:
        while not (log.is_file() and log.read_bytes().count(b"\n") > 2):
            assert process.poll() is None
            time.sleep(0.05)
        numbers = family(process.pid)
        assert len(numbers) >= 2, "the student and a loader process"
        process.kill()
        process.wait()
        for _ in range(1200):
            if not any(map(alive, numbers)):
                break
            time.sleep(0.05)
        assert not [one for one in numbers if alive(one)]
    finally:
        process.kill()
        for one in numbers:
            if alive(one):
                os.kill(one, signal.SIGKILL)
    steps = log.read_bytes().count(b"\n")
    assert [one.name for one in checkpoints(log.parent / "checkpoints")] == [f"step-{steps:07d}"]
    others = _Others(lambda text: pytest.fail(text))
    assert not others.train(log.parent) and the_cell(grid, out).state() == "started"


def test_who_comes_second_is_told_at_once_for_whom(grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        holder(out) as other,
        pytest.raises(Held, match=rf"out: kdcli ablate \(host .*, process {other.pid}, since 20"),
    ):
        ablate(AblateRequest(grid, out, workers=1), Console(file=io.StringIO()))
    assert not (out / "results.md").exists()


def test_a_stage_that_another_process_trains_is_waited_for_with_a_word(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The orphan of a killed ablation, for a while. Said once; nothing is waited for when it is gone."""
    cell = the_cell(grid, tmp_path / "out")
    monkeypatch.setattr("pipelines.ablate.runner.LOOK_SECONDS", 0.0)
    said: list[str] = []
    others = _Others(said.append)
    with holder(cell.stage_folders()[0]) as other:
        for _ in range(3):
            assert _next([cell], [], others) is None
        assert len(said) == 1 and said[0].startswith("waiting: ") and f"process {other.pid}" in said[0]
        other.kill()
        other.wait()
        assert _next([cell], [], others) is cell
    monkeypatch.setattr("pipelines.ablate.cell.WAIT_SECONDS", 0.02)
    with holder(cell.stage_folders()[0]) as other, ExitStack() as locks:
        Timer(0.3, other.kill).start()
        claim(cell.stage_folders(), locks)
    assert capsys.readouterr().out.count("waiting: ") == 1


def test_a_finished_stage_is_taken_while_its_trainer_goes_on(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its lock is held until the trainer's last stage ends: students that share a projector's stage would train one after the other."""
    cell = done_cell(grid, tmp_path / "out")
    with holder(cell.stage_folders()[0]), ExitStack() as locks:
        claim(cell.stage_folders(), locks)
    assert "waiting: " not in capsys.readouterr().out


def test_a_cell_without_room_is_no_failure_of_its_own(grid: Path, tmp_path: Path, monkeypatch: Any) -> None:
    cell = the_cell(grid, tmp_path / "out")
    cell.folder.mkdir(parents=True)
    (cell.folder / "log.txt").write_text("Error: model: No space left on device: make room\n")
    assert "No space left" in conclude(cell, DISK) and cell.state() == "new"
    monkeypatch.setattr(
        "pipelines.ablate.run.run_cells", lambda cells, slots, on_end, *more: on_end(cells[0], "no room")
    )
    found = ablate(AblateRequest(grid, tmp_path / "out", workers=1), Console(file=io.StringIO()))
    assert [one["error"] for one in found["failed"]] == ["no room"], "the command's exit status is 1"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damage_is_made_again_and_said(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cut card: the student is asked again, not trained again. A damaged record or model of its stage: trained again."""
    out = tmp_path / "out"
    cell = done_cell(grid, out)
    (stage,) = cell.stage_folders()
    card, trained = cell.card(), (stage / "metrics.jsonl").stat().st_mtime_ns
    path = cell.folder / "cell.json"
    path.write_bytes(path.read_bytes()[:50])
    assert cell.state() == "started" and "cell.json: not JSON" in cell.damage()
    (cell.folder / FAILED).write_text('{"err')
    assert cell.state() == "started"
    write_results([cell], load_grid(grid), AblateRequest(grid, out), {})
    done_cell(grid, out)
    assert (stage / "metrics.jsonl").stat().st_mtime_ns == trained and cell.state() == "done"
    assert cell.card()["results"] == card["results"] and "cell.json: not JSON" in capsys.readouterr().out
    for number, harm in enumerate(
        (lambda: flip(stage / "model" / "model.safetensors"), lambda: flip(stage / "done.json"))
    ):
        harm()
        path.write_text("{}")
        done_cell(grid, out)
        assert "the stage is trained again" in capsys.readouterr().out, number
        assert (stage / "metrics.jsonl").stat().st_mtime_ns > trained and cell.card()["results"] == card["results"]
        trained = (stage / "metrics.jsonl").stat().st_mtime_ns
    flip(stage / "metrics.jsonl")
    write_results([cell], load_grid(grid), AblateRequest(grid, out), {})
    assert "1 of 1 students finished" in (out / "results.md").read_text()
    assert not [one.name for one in cell.folder.iterdir() if one.name.startswith(".") and one.name != ".lock"]


CARD: dict[str, Any] = {
    "row": "sft",
    "stage_folders": [{"name": "01-SFT", "shared": "SFT-1"}],
    "results": {"heldout": {"key": "k", "scores": {**result(0.5), "nll": None, "nll_family_mean": 1.0}}},
    "losses": {"01-SFT": {"loss": 1.0}},
    "seconds": {"train": 1.0, "evaluate": 2.0},
}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_anywhere_in_a_card(cell: Cell, data: Any) -> None:
    """It is used, or it is made again; tables are written either way."""
    card = json.loads(json.dumps(CARD))
    card["results"]["heldout"]["key"] = cell.evaluations[0].key
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "cell.json").write_bytes(data.draw(odd_documents(card)))
    known, wrong = read_card(cell.folder)
    assert not wrong or (not known and "cell.json" in wrong)
    assert cell.state() in ("done", "started", "new")
    json.dumps(as_json([cell], None), allow_nan=False)
    assert "students finished" in markdown([cell], None, losses=True)
    if cell.state() == "done":
        ended_line(cell, "", "1/1")
