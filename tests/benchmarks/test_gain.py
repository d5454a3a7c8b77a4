"""The grid of gains: a world of its own a share, students asked and paired by world and seed; the teacher's answers as labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from benchmarks import gain
from benchmarks.common import RESULTS
from pipelines.ablate.grid import load_grid
from pipelines.demo.questions import FAMILIES
from pipelines.demo.run import DemoRecipe

DOCS = Path(__file__).parents[2] / "docs" / "results.md"
SIZES = DemoRecipe(captions=8, train=8, heldout=14, defects=0, shards=2, wrong_answers=0.5)


def scored(row: str, world: int, seed: int, share: float) -> dict[str, Any]:
    families = {name: {"exact_match": share, "nll": 2.0 - share} for name in FAMILIES}
    scores = {"family_mean": share, "nll_family_mean": 2.0 - share, "ece": 0.1, "families": families}
    return {"rows": 640, "steps": 1, "share": 0.4, "world": world, "seed": seed, "row": row, "scores": scores}


def test_differences_are_of_pairs_that_both_have():
    found = [
        scored("sft, lr 5e-4", 0, 0, 0.2),
        scored("sft, lr 5e-4", 1, 0, 0.3),
        scored("kd", 1, 0, 0.5),
        scored("kd", 0, 0, 0.3),
        scored("kd", 2, 0, 0.9),
    ]
    percent = gain.METRICS["all families, %"]
    assert gain.differences("kd", "sft, lr 5e-4", found, percent) == pytest.approx([10, 20])
    text = gain.tables(found)
    assert "+15.0 ± 7.1 [-48.5, +78.5]" in text and "40 % wrong answers" in text


def test_the_baseline_is_the_rate_of_sft_with_the_least_nll():
    found = [scored("sft, lr 5e-4", 0, 0, 0.2), scored("sft, lr 1e-3", 0, 0, 0.3), scored("kd", 0, 0, 0.5)]
    assert gain.baseline(found) == "sft, lr 1e-3" and "less sft, lr 1e-3" in gain.tables(found)
    found += [scored("sft, lr 5e-4", 1, 0, 0.2), scored("sft on the teacher's answers", 1, 0, 0.9)]
    assert gain.baseline(found) == "sft, lr 5e-4", "the other rate lacks a pair"


def test_the_docs_show_the_saved_tables():
    saved, text = json.loads((RESULTS / "gain.json").read_text())["cells"], DOCS.read_text()
    assert [line for line in gain.tables(saved).splitlines() if line not in text] == []


def test_saved_students_stay_beside_new_ones(tmp_path: Path):
    one, other = scored("kd", 0, 0, 0.2), scored("kd", 1, 0, 0.3)
    gain.save(tmp_path / "gain.json", [one, other])
    gain.save(tmp_path / "gain.json", [scored("kd", 0, 0, 0.5)])
    saved = json.loads((tmp_path / "gain.json").read_text())
    assert [cell["scores"]["family_mean"] for cell in saved["cells"]] == [0.5, 0.3]
    assert [one["machine"] for one in saved["machines"]] == [saved["cells"][0]["machine"]]


def test_more_steps_are_of_the_last_stages(tmp_path: Path):
    text = gain.write_grid(tmp_path, [0], ["kd"], 4).read_text()
    assert text.count("max_steps = 800") == 2 and text.count("max_steps = 20\n") == 2


def test_every_row_of_the_grid_is_a_grid_of_its_own(tmp_path: Path):
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "heldout.json").write_text("[]")
    names = [part.split('"')[1] for part in gain.GRID.read_text().split("\n[[variants]]\n")[1:]]
    for name in names:
        grid = load_grid(gain.write_grid(tmp_path, [0, 1], [name]))
        assert [one.name for one in grid.variants] == [name]
        assert grid.axes == {"seed": [0, 1]} and "WORLD" not in grid.path.read_text()
    with pytest.raises(SystemExit, match="no such row"):
        gain.write_grid(tmp_path, [0], ["no such row"])


def test_the_teachers_answers_become_the_labels_of_the_same_questions(tmp_path: Path):
    gain.make(tmp_path, SIZES, 0)
    gain.make_answered(tmp_path, SIZES, 0, "answered", 2)
    wrong = json.loads((tmp_path / "world" / "wrong_answers.json").read_text())
    before = [
        row for path in sorted((tmp_path / "world/train").glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    after = pq.read_table(tmp_path / "answered_world/train").to_pylist()
    assert wrong and [row["id"] for row in after[: len(before)]] == [row["id"] for row in before]
    assert len(after) == 2 * len(before)
    for one, other in zip(before, after):
        assert one["conversations"][0::2] == other["conversations"][0::2] and one["image"] == other["image"]
    mended = sum(after[one["row"]]["conversations"][2 * one["turn"] + 1]["value"] == one["right"] for one in wrong)
    assert mended > 0.6 * len(wrong), "the teacher says what is right"
    cache_before = sorted((tmp_path / "answered").rglob("*.tar"))
    gain.make_answered(tmp_path, SIZES, 0, "answered", 2)
    assert sorted((tmp_path / "answered").rglob("*.tar")) == cache_before
