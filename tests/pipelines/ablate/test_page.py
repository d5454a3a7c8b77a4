"""``results.html``: complete before any student is finished, escaped, and quiet in a real browser."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipelines.ablate.cards import CARD
from pipelines.ablate.cells import Cell, make_cells
from pipelines.ablate.grid import load_grid
from pipelines.ablate.page import write_page
from pipelines.ablate.results import markdown

HOSTILE = """
[grid]
seed = [0, 1]
method = "sft"

[[variants]]
name = "sft"

[[variants]]
name = '<script>alert("row")</script>'
learning_rate = 1e-4
"""


@pytest.fixture
def browser() -> ModuleType:
    """The report's own browser test, whose helper this one uses; skipped where that one is."""
    path = Path(__file__).parents[1] / "report" / "test_browser.py"
    spec = importlib.util.spec_from_file_location("report_browser", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    return module


def finish(cell: Cell, family_mean: float) -> None:
    """What a finished cell leaves, without the training."""
    stage = cell.stage_folders()[-1]
    stage.mkdir(parents=True, exist_ok=True)
    points = [
        {"step": step, "loss": 2.0 / (step + 1), "loss/reg": 2.0 / (step + 1), "seconds": 0.1} for step in range(5)
    ]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in points))
    cell.folder.mkdir(parents=True)
    (cell.folder / cell.stages[-1].name).symlink_to(Path("../../stages") / stage.name)
    (cell.folder / "run.json").write_text(json.dumps({"stages": [{"stage": "SFT", "method": "sft"}], "plan_hash": "p"}))
    family = {"n": 4, "exact_match": family_mean, "tokens": 9, "nll": 1.5 - family_mean}
    scores = {"n": 4, "exact_match": family_mean, "family_mean": family_mean, "families": {"<b>shapes": family}}
    scores["skipped"] = {"no_answer": 3}
    result = {"key": cell.evaluations[0].key, "scores": {**scores, "nll": 1.0, "nll_family_mean": 1.5 - family_mean}}
    card = {"results": {"heldout": result}, "losses": {}, "seconds": {"train": 3.0, "evaluate": 1.0}}
    (cell.folder / CARD).write_text(json.dumps(card))


@pytest.fixture
def cells(write_grid: Callable[..., Path], tmp_path: Path) -> list[Cell]:
    """Two rows of two seeds, three of them finished."""
    made = make_cells(load_grid(write_grid(HOSTILE)), tmp_path / "out")
    for number, cell in enumerate(made[:3]):
        finish(cell, 0.5 + 0.1 * number)
    return made


def write(cells: list[Cell], out: Path, failed: Any = ()) -> str:
    return write_page(cells, "sft", failed, "a <grid>", out).read_text()


def test_names_are_text_and_missing_cells_are_told(cells: list[Cell], tmp_path: Path) -> None:
    failed = [{"name": "x", "error": "<script>", "log": "log.txt"}]
    page = write(cells, tmp_path / "page.html", failed)
    assert "<script" not in page and "&lt;script&gt;alert(" in page and "a &lt;grid&gt;" in page
    assert "55.0 ± 7.1" in page and "+20.0" in page, "the mean of two seeds; one pair against the baseline"
    told = "4 of 7 rows asked, 3 skipped: 3 no_answer"
    assert told in page and f"\n\n{told}\n\n" in markdown(cells, "sft", losses=False)
    assert page.count('class="mean"') == 6, "two rows of means and of nats, and one row of differences of each"


def test_nothing_finished_is_a_page_too(write_grid: Callable[..., Path], tmp_path: Path) -> None:
    page = write(make_cells(load_grid(write_grid(HOSTILE)), tmp_path / "out"), tmp_path / "page.html")
    assert "No student has been asked yet" in page and "Losses" not in page


def test_the_page_opens_quietly_and_alone(browser: ModuleType, cells: list[Cell], tmp_path: Path) -> None:
    write(cells, tmp_path / "page.html")
    console, asked, document = browser.browse(tmp_path / "page.html", tmp_path / "profile")
    assert (console, asked) == ([], []) and "<circle" in document
