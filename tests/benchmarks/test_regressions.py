"""What became slower is named, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.common import RESULTS, finish
from benchmarks.regressions import WATCHED, figures, slower

BEFORE = {
    "machine": {"date": "2026-11-25"},
    "results": {"sft": {"packed / unpacked": 0.6}, "kd": {"packed / unpacked": 0.6}},
}


def test_a_figure_that_is_worse_by_more_than_the_slack() -> None:
    now = {
        "results": {
            "sft": {"packed / unpacked": 0.72},
            "kd": {"packed / unpacked": 0.5},
            "new": {"packed / unpacked": 9.0},
        }
    }
    assert slower("packing", now, BEFORE) == [
        "slower than on 2026-11-25: packing: results, sft, packed / unpacked: 0.6 → 0.72"
    ]
    assert slower("packing", BEFORE, BEFORE) == [] and slower("overhead", now, BEFORE) == []


def test_more_is_better_of_a_loader() -> None:
    before, now = ({"loader / student": {"sft, 2": value}} for value in (20.0, 15.0))
    assert len(slower("loader", now, before)) == 1 and slower("loader", before, now) == []


@pytest.mark.parametrize("name", WATCHED)
def test_saved_results_have_what_is_watched(name: str) -> None:
    files = sorted(RESULTS.glob(f"{name}-*.json"))
    assert files
    for watched in WATCHED[name]:
        assert any(list(figures(json.loads(file.read_text()), watched.path)) for file in files), watched


def test_every_benchmark_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    body = {"machine": {"machine": "2-core X, CPU", "date": "today"}, "shapes": "demo", "results": BEFORE["results"]}
    finish("packing", body, save=True)
    finish("packing", {**body, "results": {"kd": {"packed / unpacked": 0.9}}}, save=False)
    *_, told, last = capsys.readouterr().out.splitlines()
    assert told == "slower than on today: packing: results, kd, packed / unpacked: 0.6 → 0.9"
    assert json.loads(last)["slower"] == [told]
    assert json.loads((tmp_path / "results" / "packing-2-core-x-cpu-demo.json").read_text()) == body
