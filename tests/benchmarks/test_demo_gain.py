"""The saved gain of the demo is a run of the demo's own recipe, and the table of docs/results.md is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common import RESULTS
from benchmarks.demo_gain import results_table

DOCS = Path(__file__).parents[2] / "docs" / "results.md"


def body(points: list[float], nats: list[float]) -> dict:
    def scores(percent: float, nll: float) -> list[dict]:
        more = {"text percent": 40.0, "all percent": percent, "all nats": nll}
        return [{"seed": seed, "percent": percent, "nats": nll, **more} for seed in range(len(points))]

    return {
        "points": points,
        "nats": nats,
        "students": {"sft": scores(22, 1), "kd": scores(33, 0.9), "sft 0.002": scores(20, 1.1)},
    }


def test_a_line_a_seed_and_the_mean_of_several() -> None:
    lines = results_table(body([10.0, 12.0], [-0.1, -0.12])).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| 0   ", "| 1   ", "| mean"]
    assert "22.0 % / 1.000" in lines[2] and "+11.0 ± 1.4" in lines[4] and "-0.110 ± 0.014" in lines[4]
    assert [one.strip() for one in lines[-1].split("|")[1:3]] == ["sft 0.002", "20.0 % / 1.100"]
    assert "mean" not in results_table(body([10.0], [-0.1]))


def saved(name: str, part: int) -> list[str]:
    return results_table(json.loads((RESULTS / name).read_text())).split("\n\n")[part].splitlines()


@pytest.mark.parametrize("line", [*saved("demo_gain.json", 0), *saved("demo_gain_tuning.json", 1)])
def test_the_docs_show_the_saved_tables(line: str) -> None:
    assert line in DOCS.read_text()


def test_sft_has_the_rate_that_is_best_with_an_image() -> None:
    students = json.loads((RESULTS / "demo_gain_tuning.json").read_text())["students"]
    mean = {row: sum(one["nats"] for one in scores) for row, scores in students.items()}
    assert min((row for row in mean if row.startswith("sft")), key=mean.__getitem__) == "sft"
