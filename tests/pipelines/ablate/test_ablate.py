"""Grids end to end: fresh processes, shared stages, continuing, failing, and what a changed grid costs."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from cli import main
from pipelines.ablate.cell import run_cell
from pipelines.ablate.cells import LOG, Cell, make_cells, request
from pipelines.ablate.grid import load_grid
from pipelines.ablate.run import LOG_TAIL, AblateRequest, ablate, dry_run, running_line
from pipelines.ablate.runner import Slot, conclude, make_slots, prune_models, run_cells
from pipelines.report.runs import read_runs
from pipelines.train.output_lock import alone
from teacher_cache.errors import KdcliError
from teacher_cache.stopping import Stopped
from tests.pipelines.ablate.conftest import fork_cells
from tests.warm import Warm

MORE = """
[[variants]]
name = "kd"
method = "kd"
stages = "PT,DFT"
"""


def go(grid: Path, out: Path, **asked: Any) -> dict[str, Any]:
    return ablate(AblateRequest(grid, out, workers=1, **asked), Console(file=io.StringIO()))


def states(grid: Path, out: Path) -> dict[str, str]:
    return {one["name"]: one["state"] for one in dry_run(AblateRequest(grid, out))[0]}


def in_process(grid: Path, out: Path, *names: str) -> list[Cell]:
    """Run the named cells without processes of their own; all cells of the grid."""
    cells = make_cells(load_grid(grid), out)
    for cell in cells:
        if cell.name in names:
            cell.folder.mkdir(parents=True, exist_ok=True)
            run_cell(cell.folder, json.loads(json.dumps(request(cell))))
    return cells


def stamps(out: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(out.glob(pattern))}


@pytest.mark.usefixtures("forked_cells")
def test_a_grid_from_the_command_line_and_again(write_grid: Callable[..., Path], tmp_path: Path) -> None:
    """Two rows of two seeds side by side; a PT a seed serves both rows; the second call trains nothing and says the same."""
    grid, out = write_grid(top='baseline = "sft"\n'), tmp_path / "out"
    arguments = ["ablate", str(grid), "--out", str(out), "--workers", "2"]
    first = CliRunner().invoke(main, arguments)
    assert first.exit_code == 0, first.output
    assert set(states(grid, out).values()) == {"done"}
    assert len(list((out / "stages").glob("PT-*"))) == 2 and len(list((out / "stages").iterdir())) == 6
    assert "| less sft " in first.stdout and "4 of 4 students finished" in first.stdout
    assert first.stdout.strip() in (out / "results.md").read_text()
    body = json.loads((out / "results.json").read_text())
    (table,) = body["tables"]
    assert {name: one["nll, nats a token"]["n"] for name, one in table["rows"].items()} == {"sft": 2, "llava-kd": 2}
    assert [run.group for run in read_runs([out])] == ["llava-kd", "llava-kd", "sft", "sft"]
    before = stamps(out, "*/*/cell.json")
    again = CliRunner().invoke(main, [*arguments, "--json"])
    assert again.exit_code == 0 and json.loads(again.stdout)["tables"] == body["tables"]
    assert stamps(out, "*/*/cell.json") == before and len(before) == 4


def test_a_changed_grid_runs_only_what_is_new(write_grid: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    in_process(write_grid(), out, "sft/seed-0")
    trained = stamps(out, "stages/*/metrics.jsonl")
    assert states(write_grid(more=MORE), out) == {
        "sft/seed-0": "done",
        "sft/seed-1": "new",
        "llava-kd/seed-0": "started",  # its PT is there
        "llava-kd/seed-1": "new",
        "kd/seed-0": "started",
        "kd/seed-1": "new",
    }
    in_process(write_grid(more=MORE), out, "kd/seed-0")
    assert trained.items() <= stamps(out, "stages/*/metrics.jsonl").items() and len(trained) == 2
    # Another question to a trained student costs no training; the first answer stays.
    asked = write_grid()
    pruned = '{compress = "fastv", keep = 9, compress_layer = 1}'
    several = f'"PT,SFT"\neval = [{{}}, {{batch_size = 1}}, {pruned}]'
    asked.write_text(asked.read_text().replace('"PT,SFT"', several))
    assert states(asked, out)["sft/seed-0"] == "started"
    in_process(asked, out, "sft/seed-0")
    (card,) = (json.loads(path.read_text()) for path in out.glob("sft/*/cell.json"))
    last = "heldout, compress=fastv, keep=9, compress_layer=1"
    assert list(card["results"]) == ["heldout", "heldout, batch_size=1", last]
    assert trained.items() <= stamps(out, "stages/*/metrics.jsonl").items()
    first, second, third = (one["scores"]["nll"] for one in card["results"].values())
    assert first == pytest.approx(second, rel=1e-5) and third != pytest.approx(first, rel=1e-5)


def test_an_interrupt_ends_the_children_and_the_next_run_continues(
    write_grid: Callable[..., Path],
    own_modules: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warm: Warm,
) -> None:
    """Stopped between two checkpoints of the first stage: the child is gone, the next one starts from the checkpoint. The second time
    by a signal; the child, then a forked one, has time for a checkpoint of its last step. In a folder where the user has modules with
    names of ours."""
    monkeypatch.chdir(own_modules(tmp_path / "work"))
    out, grid = tmp_path / "out", write_grid()
    grid.write_text(grid.read_text().replace("max_steps = 1\n", "max_steps = 400\nsave_steps = 2\n"))
    (cell,) = (one for one in make_cells(load_grid(grid), out) if one.name == "sft/seed-0")
    first = cell.stage_folders()[0]

    def interrupt(running: list[Cell]) -> None:
        if list(first.glob("checkpoints/step-*")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells([cell], [Slot("cpu", 1)], lambda one, error: None, interrupt)
    with (first / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it: the child is gone
    assert cell.state() == "started" and not (first / "done.json").is_file()
    (kept, *_) = sorted(first.glob("checkpoints/step-*"), reverse=True)
    step = int(kept.name.removeprefix("step-"))
    logged = (first / "metrics.jsonl").read_text().splitlines()[:step]
    # Fewer steps from here on would be another stage: only the time of the test is saved, by stopping once more.

    def stop_later(running: list[Cell]) -> None:
        if len((first / "metrics.jsonl").read_text().splitlines()) > step + 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    fork_cells(warm, monkeypatch)
    with pytest.raises(Stopped, match="stopped by SIGUSR1"):
        run_cells([cell], [Slot("cpu", 1)], lambda one, error: None, stop_later)
    lines = (first / "metrics.jsonl").read_text().splitlines()
    assert lines[:step] == logged and (first / "checkpoints" / f"step-{len(lines):07d}" / "state.json").is_file()
    assert conclude(cell, 143) and cell.state() == "started", "no failure of its own: the next run goes on with it"
    assert conclude(cell, -9) and cell.state() == "failed"


@pytest.mark.usefixtures("forked_cells")
def test_a_failing_student_does_not_stop_the_others(write_grid: Callable[..., Path], tmp_path: Path) -> None:
    """A learning rate that blows the weights up: told with its log, kept out of the table, tried again only when asked."""
    out = tmp_path / "out"
    grid = write_grid(
        """
[grid]
method = "sft"
stages = "SFT"
max_steps = 2

[[variants]]
name = "wild"
learning_rate = 1e30

[[variants]]
name = "tame"
"""
    )
    done = CliRunner().invoke(main, ["ablate", str(grid), "--out", str(out), "--workers", "1"])
    assert done.exit_code == 1
    assert states(grid, out) == {"wild/seed-0": "failed", "tame/seed-0": "done"}
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("failed: "))
    assert "at step 1" in line and "log.txt" in line and "wild" in line
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("| wild"))
    assert "–" in row and row.rstrip(" |").endswith("0")
    (failed,) = out.glob("wild/*/failed.json")
    before = failed.stat().st_mtime_ns
    assert [one["name"] for one in go(grid, out)["failed"]] == ["wild/seed-0"]
    assert failed.stat().st_mtime_ns == before
    assert "wild" in (out / "results.html").read_text()
    grid.write_text(grid.read_text().replace("1e30", "1e-30"))
    assert states(grid, out)["wild/seed-0"] == "new", "another learning rate is another student"


def test_models_go_when_nothing_starts_from_them_and_come_back_when_asked(
    write_grid: Callable[..., Path], tmp_path: Path
) -> None:
    out, grid = tmp_path / "out", write_grid(top="keep_models = false\n")
    cells = in_process(grid, out, "sft/seed-0")
    prune_models(cells)
    kept = [path.parent.name.split("-")[0] for path in out.glob("stages/*/model")]
    assert kept == ["PT"], "llava-kd with this seed is still to start from it"
    cells = in_process(grid, out, "llava-kd/seed-0")
    prune_models(cells)
    assert not list(out.glob("stages/*/model")) and not list(out.glob("stages/*/checkpoints"))
    scores = {path: json.loads(path.read_text())["results"]["heldout"] for path in out.glob("sft/*/cell.json")}
    grid.write_text(grid.read_text().replace('"PT,SFT"', '"PT,SFT"\neval = [{}, {batch_size = 1}]'))
    in_process(grid, out, "sft/seed-0")
    for path, before in scores.items():
        results = json.loads(path.read_text())["results"]
        assert results["heldout"] == before and len(results) == 2
    assert sum(1 for _ in out.glob("stages/*/model")) == 2, "PT and SFT were trained again"


def test_a_damaged_shared_stage_is_trained_again(write_grid: Callable[..., Path], tmp_path: Path) -> None:
    """Neither a student that starts from it nor another question to one that is trained goes on from it."""
    out, grid = tmp_path / "out", write_grid()
    in_process(grid, out, "sft/seed-0")
    (weights,) = out.glob("stages/PT-*/model/model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    in_process(grid, out, "llava-kd/seed-0")
    assert weights.read_bytes() == whole and states(grid, out)["llava-kd/seed-0"] == "done"


def test_two_ablations_in_one_folder(write_grid: Callable[..., Path], tmp_path: Path) -> None:
    said = rf"kdcli ablate \(host .*process {os.getpid()}, since .*another --out"
    with alone(tmp_path / "out", "kdcli ablate", "--out"), pytest.raises(KdcliError, match=said):
        go(write_grid(), tmp_path / "out", limit=0)


def test_only_and_limit_choose(write_grid: Callable[..., Path], tmp_path: Path) -> None:
    grid, out = write_grid(), tmp_path / "out"
    listed, text = dry_run(AblateRequest(grid, out, only="llava-kd"))
    assert [one["name"] for one in listed] == ["llava-kd/seed-0", "llava-kd/seed-1"] and "2 new" in text
    assert [one["name"] for one in dry_run(AblateRequest(grid, out, only="*/seed-1"))[0]] == [
        "sft/seed-1",
        "llava-kd/seed-1",
    ]
    assert go(grid, out, limit=0)["failed"] == []
    assert "0 of 4 students finished" in (out / "results.md").read_text()
    with pytest.raises(KdcliError, match="matches no student"):
        dry_run(AblateRequest(grid, out, only="nothing*"))


def test_where_cells_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert make_slots(None, 2) == [Slot("cpu", 4)] * 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert make_slots(None, None) == [Slot("cuda:0"), Slot("cuda:1")]
    assert make_slots("cuda:1,cpu", None) == [Slot("cuda:1"), Slot("cpu", 8)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert Slot("cuda:1").environment()["CUDA_VISIBLE_DEVICES"] == "7"
    assert Slot("cpu", 3).environment()["CUDA_VISIBLE_DEVICES"] == ""
    assert Slot("cpu", 3).environment()["OMP_NUM_THREADS"] == "3"
    for devices, workers, said in (("cuda:2", None, "2 GPUs"), ("tpu", None, "cuda:N"), ("cpu", 1, "exclude")):
        with pytest.raises(KdcliError, match=said):
            make_slots(devices, workers)
    with pytest.raises(KdcliError, match="at least 1"):
        make_slots(None, 0)


def test_the_bar_says_how_far_a_student_is(write_grid: Callable[..., Path], tmp_path: Path) -> None:
    cell = make_cells(load_grid(write_grid()), tmp_path / "out")[0]
    assert running_line(cell) == "sft/seed-0", "no log yet"
    cell.folder.mkdir(parents=True)
    for said, told in (
        ("", ""),
        ("note: something\n", ""),
        ("x" * LOG_TAIL + "\n02-SFT step 120/200 loss 1.5\n", " 02-SFT step 120/200"),
        ("02-SFT step 200/200 loss 1.5\nevaluating: heldout\n", " evaluating"),
    ):
        (cell.folder / LOG).write_text(said)
        assert running_line(cell) == f"sft/seed-0{told}"
