"""Captures and whole trainings on a GPU beside those of the CPU; skipped where there is no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import cli
from pipelines.capture.cache_teacher import capture
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from tests.conftest import ALL_FIELDS

FIRST_LAYER = ("attention", "vision_features")


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(cli.main, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def rows_of(folder: Path, fields: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Row key → decoded fields."""
    cache = TeacherCache(str(folder))
    rows = CachedSamples(cache, cache.parts(), fields)
    places = [(position, number) for position, count in enumerate(rows.counts) for number in range(count)]
    return {row.key: row.fields for row in (rows.read(*place) for place in places)}


def hidden_of(rows: dict[str, dict[str, Any]], name: str) -> torch.Tensor:
    return torch.cat([one[name] for one in rows.values()])


@pytest.fixture(scope="module")
def on_gpu(make_request: Any, gpu: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_cache`` with the fields of the first layer, captured on the GPU."""
    out = tmp_path_factory.mktemp("gpu") / "fp32"
    capture(make_request(out, device=gpu, fields=(*ALL_FIELDS, *FIRST_LAYER)))
    return out


def test_a_capture_says_what_one_on_the_cpu_says(on_gpu: Path, tiny_cache: Path) -> None:
    ours, theirs = rows_of(on_gpu, ALL_FIELDS), rows_of(tiny_cache, ALL_FIELDS)
    assert ours.keys() == theirs.keys()
    for name in ("response_hidden", "vision_hidden"):
        mine, other = hidden_of(ours, name), hidden_of(theirs, name)
        assert float((mine - other).norm() / other.norm()) < 1e-3, name
    for key, fields in ours.items():
        for name in ("response_topk", "vision_topk"):
            mine, other = fields[name], theirs[key][name]
            torch.testing.assert_close(mine.log_probs, other.log_probs, rtol=0, atol=2e-2)
            torch.testing.assert_close(mine.log_tail.exp(), other.log_tail.exp(), rtol=1e-2, atol=1e-3)


def test_batches_have_no_say(on_gpu: Path, make_request: Any, gpu: str, tmp_path: Path) -> None:
    capture(make_request(tmp_path / "one", device=gpu, batch_tokens=1, fields=("vision_hidden", "response_hidden")))
    one, many = (rows_of(folder, ("vision_hidden", "response_hidden")) for folder in (tmp_path / "one", on_gpu))
    for name in ("response_hidden", "vision_hidden"):
        mine, other = hidden_of(one, name), hidden_of(many, name)
        assert float((mine - other).norm() / other.norm()) < 1e-4, name


def test_first_layer_fields_can_be_added(
    on_gpu: Path, make_request: Any, gpu: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    capture(make_request(tmp_path / "cache", device=gpu, fields=("response_topk",)))
    flags = ["--teacher", tiny_teacher, "--dtype", "float32", "--device", gpu, "--batch-tokens", 1024, "--workers", 1]
    run("cache", "add-field", tmp_path / "cache", "--field", "attention", "--field", "vision_features", *flags)
    added, at_once = rows_of(tmp_path / "cache", FIRST_LAYER), rows_of(on_gpu, FIRST_LAYER)
    for name in FIRST_LAYER:
        for key, fields in added.items():
            torch.testing.assert_close(fields[name], at_once[key][name], rtol=2e-2, atol=1e-2)


def test_the_standard_profile_verifies_and_two_workers_share_the_card(
    make_request: Any, gpu: str, tmp_path: Path
) -> None:
    capture(make_request(tmp_path / "cache", device=gpu, store="standard", fields=(), workers=2))
    run("cache", "verify", tmp_path / "cache")


@pytest.fixture
def train(tiny_student: Path, on_gpu: Path) -> Callable[..., tuple[list[float], dict[str, torch.Tensor]]]:
    """``train(folder, steps)`` → (losses, weights) of an llava-kd stage of six steps that stops behind ``steps`` of them."""

    def go(folder: Path, *more: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
        flags = ["--method", "llava-kd", "--student", tiny_student, "--cache", on_gpu, "--stages", "DFT"]
        flags += ["--output-dir", folder, "--max-steps", 6, "--save-steps", 2, "--per-device-train-batch-size", 4]
        run("train-student", *flags, "--report-to", "none", *more)
        lines = [json.loads(line) for line in (folder / "01-DFT" / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines], load_file(folder / "01-DFT" / "model" / "model.safetensors")

    return go


def test_loader_processes_beside_a_gpu_change_nothing(train: Callable[..., Any], tmp_path: Path) -> None:
    alone, beside = train(tmp_path / "alone"), train(tmp_path / "beside", "--dataloader-num-workers", 2)
    assert alone[0] == pytest.approx(beside[0], rel=1e-5)
    for name, one in alone[1].items():
        torch.testing.assert_close(one, beside[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_broken_off_training_goes_on(
    train: Callable[..., Any], on_gpu: Path, tiny_student: Path, tmp_path: Path
) -> None:
    from pipelines.settings import Settings
    from pipelines.train.train_student import train as train_in_process
    from student_train.config import TrainSettings

    class Stop(Exception):
        pass

    def stop(stage: str, at: int, steps: int, result: Any) -> None:
        if at == 3:
            raise Stop

    sizes = {"per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 2, "report_to": "none"}
    settings = replace(TrainSettings(student=str(tiny_student), output_dir=str(tmp_path / "broken")), **sizes)
    with pytest.raises(Stop):
        train_in_process(str(on_gpu), "llava-kd", Settings(train=settings), "DFT", on_step=stop)
    quiet, resumed = train(tmp_path / "quiet"), train(tmp_path / "broken")
    assert quiet[0] == pytest.approx(resumed[0], rel=1e-5) and len(quiet[0]) == 6
    for name, one in quiet[1].items():
        torch.testing.assert_close(one, resumed[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_student_answers_on_a_gpu_as_on_the_cpu(world: Any, tiny_student: Path, gpu: str, tmp_path: Path) -> None:
    said: list[list[dict[str, Any]]] = []
    for device in ("cpu", gpu):
        out = tmp_path / "answers.jsonl"
        run("eval", tiny_student, "--data", world.heldout, "--device", device, "--max-new-tokens", 4, "--answers", out)
        said.append([json.loads(line) for line in out.read_text().splitlines()])
    for ours, theirs in zip(*said, strict=True):
        assert ours.pop("nats") == pytest.approx(theirs.pop("nats"), rel=1e-3)
        assert ours == theirs
