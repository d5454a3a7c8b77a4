"""``train-student --method epic-*`` from end to end: broken off and run again, on two processes, then asked under other operators."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.ablate.grid import _files
from pipelines.judge.evaluation.run import evaluate_folder
from pipelines.settings import Settings
from pipelines.train.train_student import train
from student_train.config import TrainSettings
from teacher_cache.errors import KdcliError
from teacher_cache.sources import DataSpec
from tests.warm import Warm


def settings_for(output: Path, student: Path) -> Settings:
    settings = TrainSettings(student=str(student), output_dir=str(output), per_device_train_batch_size=4, max_steps=5)
    return Settings(
        train=TrainSettings(**{**vars(settings), "save_steps": 2, "report_to": "none", "learning_rate": 1e-3})
    )


class Stop(Exception):
    pass


def stop_after_third(stage: str, step: int, steps: int, result: Any) -> None:
    if step == 3:
        raise Stop


@pytest.mark.parametrize(
    ("method", "knobs"),
    [("epic-tcd", {"layer": 1, "operator": "random"}), ("epic-lcd", {"lowest_layer": 1, "operator": "dart"})],
)
def test_broken_off_and_run_again_ends_with_the_same_bits(
    tiny_cache: Path, tiny_student: Path, tmp_path: Path, method: str, knobs: dict[str, Any]
) -> None:
    """Ratios, layers and random choices are functions of seed and step; the run card names knobs, and no field is read."""
    quiet, broken = (settings_for(tmp_path / name, tiny_student) for name in ("quiet", "broken"))
    train(str(tiny_cache), method, quiet, "DFT", knobs=knobs)
    with pytest.raises(Stop):
        train(str(tiny_cache), method, broken, "DFT", knobs=knobs, on_step=stop_after_third)
    train(str(tiny_cache), method, broken, "DFT", knobs=knobs)
    ours, theirs = (load_file(tmp_path / name / "01-DFT/model/model.safetensors") for name in ("quiet", "broken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    card = json.loads((tmp_path / "quiet/run.json").read_text())["stages"][0]
    assert knobs.items() <= card["knobs"].items() and card["fields"] == {"self_teacher": []}
    lines = [json.loads(line) for line in (tmp_path / "quiet/01-DFT/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss/self"] > -1e-6 and all(line["loss/self"] > 1e-5 for line in lines[-2:])


def test_two_processes(tiny_cache: Path, tiny_student: Path, tmp_path: Path, warm: Warm) -> None:
    """The teaching pass goes past the gradient averaging, the student's pass through it. The paper's tower trains, too."""
    line = ["train-student", "--method", "epic-tcd", "--student", str(tiny_student), "--cache", str(tiny_cache)]
    line += ["--stages", "DFT", "--output-dir", str(tmp_path / "run"), "--max-steps", "3", "--set", "layer=1"]
    line += ["--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "2", "--report-to", "none"]
    line += ["--preset", "paper"]
    warm.together(2, line, tmp_path)
    lines = [json.loads(one) for one in (tmp_path / "run/01-DFT/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(one["grad_norm"] > 0 for one in lines)
    assert abs(lines[0]["loss/self"]) < 1e-6 and all(
        one["loss/self"] > 1e-5 for one in lines[1:]
    )  # both passes begin alike


def test_trained_with_one_operator_asked_under_others(
    tiny_cache: Path, tiny_student: Path, world: Any, tmp_path: Path
) -> None:
    trained = train(
        str(tiny_cache), "epic-tcd", settings_for(tmp_path / "run", tiny_student), "DFT", knobs={"layer": 1}
    )
    spec = DataSpec("heldout", str(world.heldout), image_root=str(world.images))
    for operator in ("dart", "fastv", "random"):
        result = evaluate_folder(trained["model"], spec, device="cpu", compress=operator, keep=9, compress_layer=1)
        assert result["n"] == 7 and result["compression"]["operator"] == operator


@pytest.mark.parametrize(("compressor", "tokens"), [("adaptive_pool", 9), ("mqt", 16)])
def test_behind_a_compressor(
    tiny_cache: Path, tiny_student: Path, world: Any, tmp_path: Path, compressor: str, tokens: int
) -> None:
    """Few vision tokens an image leave the projector, fewer the language model's first layer; answers with 4 of them."""
    settings = settings_for(tmp_path / "run", tiny_student)
    train_settings = replace(settings.train, compressor=compressor, vision_tokens=tokens, max_steps=3)
    knobs = {"layer": 1, "operator": "fastv"}  # of so few tokens dart would leave the same 4 at every ratio
    trained = train(str(tiny_cache), "epic-tcd", replace(settings, train=train_settings), "DFT", knobs=knobs)
    lines = [json.loads(one) for one in (tmp_path / "run/01-DFT/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(one["loss/self"] >= 0 for one in lines) and lines[-1]["loss/self"] > 0
    spec = DataSpec("heldout", str(world.heldout), image_root=str(world.images))
    result = evaluate_folder(trained["model"], spec, device="cpu", compress="dart", keep=4, compress_layer=1)
    assert result["n"] == 7


def test_a_grid_knows_wrong_compression_before_training(world: Any) -> None:
    table = {"name": "heldout", "path": str(world.heldout), "image_root": str(world.images)}
    (file,) = _files([{**table, "compress": "dart", "keep": 9}], Path("grid.toml"))
    assert file.options == {"compress": "dart", "keep": 9}
    with pytest.raises(KdcliError, match="choose from dart, fastv"):
        _files([{**table, "compress": "drat", "keep": 9}], Path("grid.toml"))
