"""Align-KD through ``train-student``: both stages, the maps handed on, and two processes as one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.warm import Warm


@pytest.fixture(scope="module")
def cache(make_request: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pipelines.capture.cache_teacher import capture

    out = tmp_path_factory.mktemp("align") / "cache"
    capture(make_request(out, fields=("response_topk", "attention", "vision_features")))
    return out


def train(warm: Warm, cache: Path, student: Path, output: Path, processes: int, batch: int) -> list[dict[str, Any]]:
    """Metrics of both stages, two steps each."""
    words = ["train-student", "--cache", str(cache), "--student", str(student), "--method", "align-kd"]
    words += ["--output-dir", str(output), "--max-steps", "2", "--per-device-train-batch-size", str(batch)]
    words += ["--gradient-accumulation-steps", "1", "--report-to", "none", "--set", "gamma=20"]
    warm.together(processes, words, output.parent)
    files = [output / f"0{number}-{stage}" / "metrics.jsonl" for number, stage in ((1, "DPT"), (2, "DFT"))]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.exhaustive  # two processes; test_processes.py has another method
def test_two_processes_are_one(cache: Path, tiny_student: Path, tmp_path: Path, warm: Warm) -> None:
    one = train(warm, cache, tiny_student, tmp_path / "one", 1, 8)
    two = train(warm, cache, tiny_student, tmp_path / "two", 2, 4)
    assert len(one) == len(two) == 4
    for alone, together in zip(one, two):
        assert {name for name in alone if name.startswith("loss/")} == {
            f"loss/{name}" for name in ("reg", "res", "vis", "focus", "att")
        }
        for name in ("loss", "loss/vis", "loss/att", "grad_norm"):
            assert together[name] == pytest.approx(alone[name], rel=2e-4), name
    assert (tmp_path / "one" / "02-DFT" / "maps.safetensors").is_file()
    assert (tmp_path / "one" / "02-DFT" / "model" / "model.safetensors").is_file()
