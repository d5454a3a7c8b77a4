"""The tables of docs/results.md from a grid's results, from its folder and from what was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.grid_tables import MEAN, NLL, read, tables


def spread(mean: float, std: float | None) -> dict[str, Any]:
    return {"mean": mean, "std": std, "n": 3 if std is not None else 1}


def body(folder: Path) -> Path:
    rows = {"sft": {MEAN: spread(24.6, 2.6), NLL: spread(0.948, 0.009)}, "kd": {MEAN: spread(25.0, None)}}
    table = {"evaluation": "heldout", "rows": rows, "less": "sft", "differences": {"kd": {NLL: spread(-0.5, 0.25)}}}
    cells = [
        {"row": "sft", "seed": 0, "state": "done", "results": {"heldout": {"key": "1", "scores": {"nll": 0.9}}}},
        {"row": "kd", "seed": 0, "state": "failed"},
    ]
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"grid": "x/em_kd.toml", "tables": [table], "cells": cells}))
    return folder


def test_a_line_a_row_with_its_difference_to_the_baseline(tmp_path: Path) -> None:
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in tables(read(body(tmp_path / "grid"))).splitlines()
    ]
    assert lines[0] == ["em_kd", "exact match, %", "nll", "nll less sft", "seeds"]
    assert lines[2] == ["sft", "24.6 ± 2.6", "0.948 ± 0.009", "", "3"]
    assert lines[3] == ["kd", "25.0", "–", "-0.500 ± 0.250", "1"]


def test_saved_results_give_the_same_tables(tmp_path: Path) -> None:
    found = read(body(tmp_path / "grid"))
    assert [cell["row"] for cell in found["cells"]] == ["sft"], "unfinished students have no scores"
    saved = tmp_path / "grid-em_kd.json"
    saved.write_text(json.dumps(found))
    assert tables(read(saved)) == tables(found)
