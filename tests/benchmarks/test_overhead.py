from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import overhead
from benchmarks.demo_training.tokenizer import load_tokenizer


def test_rows_have_real_token_counts() -> None:
    tokenizer = load_tokenizer()
    for row in overhead.long_rows(3):
        answers = [turn.answer for turn in row.turns]
        tokens = sum(len(tokenizer(answer)["input_ids"]) + 1 for answer in answers)
        assert len(row.scenes) == 4 and row.conversations[0]["value"].count("<image>") == 4
        assert 120 <= tokens <= 230


def test_every_byte_of_the_tars_is_accounted_for(tiny_models: str, capsys: pytest.CaptureFixture[str]) -> None:
    overhead.main(["--models", tiny_models, "--rows", "6", "--calibration-rows", "6"])
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert body["rows"] == 6 and body["a_row"]["vision_rows"] == 4 * 36
    for one in (*body["columns"].values(), *body["totals"].values()):
        parts = ("payload", "safetensors", "headers and padding", "end")
        assert one["tar"] == pytest.approx(sum(one[part] for part in parts), abs=0.5)
        assert 0 < one["overhead at 1,300"] < one["overhead"]
    assert body["columns"][overhead.DENSE]["payload"] > body["columns"]["affinity"]["payload"]


def test_a_tar_s_size_is_told_apart(tmp_path: Path, tiny_models: str) -> None:
    body = overhead.measure(Path(tiny_models), tmp_path, 4, 4)
    for name, one in body["columns"].items():
        members = 6 if name == "samples" else 1  # json, tokens and four pictures
        assert 512 * members <= one["headers and padding"] < 1024 * members
