from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks import real_shapes, step, worlds
from benchmarks.step_variants import CACHED, LIVE, SFT, TOPK, VARIANTS


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_four_variants_with_ratios_and_memory(
    tiny_models: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_process = step.memory_in_subprocess

    def mostly_here(name: str, options: Any, url: str) -> dict[str, float]:
        if name == LIVE:
            return own_process(name, options, url)
        arguments = ["--models", tiny_models, "--batch", "3", "--memory-of", name, "--cache", url]
        return step.peak_memory(step.parse(arguments))

    monkeypatch.setattr(step, "memory_in_subprocess", mostly_here)  # a process costs seconds of imports
    step.main(["--models", tiny_models, "--batch", "3", "--steps", "2", "--repeats", "1"])
    body = last_line(capsys)
    assert set(body["memory_mib"]) == set(body["gflop_a_step"]) == set(VARIANTS)
    assert all(0 < one["before"] <= one["peak"] for one in body["memory_mib"].values())
    flops, losses = body["gflop_a_step"], body["loss_of_first_step"]
    assert flops[SFT] < flops[TOPK] < flops[CACHED] < flops[LIVE]
    assert losses[CACHED] == pytest.approx(losses[LIVE], rel=2e-3)  # the same losses, but for the cache's bfloat16
    assert losses[TOPK] <= losses[CACHED] + 1e-3
    assert body["ratios"]["live / cached"]["operations"] == pytest.approx(flops[LIVE] / flops[CACHED], rel=0.05)


@pytest.mark.usefixtures("small_real_shapes")
def test_real_shapes_run_when_they_are_narrow(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(name: str, options: Any, url: str) -> dict[str, float]:
        options = step.parse(["--shapes", "real", "--batch", "2", "--steps", "2", "--memory-of", name, "--cache", url])
        return step.peak_memory(options)

    monkeypatch.setattr(step, "memory_in_subprocess", here)  # a process of its own would build the full widths
    step.main(["--shapes", "real", "--batch", "2", "--steps", "2", "--repeats", "1"])
    assert set(last_line(capsys)["seconds_a_step"]) == set(VARIANTS)


@pytest.mark.parametrize(("size", "billions"), [("7B", 8.0), ("0.5B", 0.9)])
def test_full_shapes_construct_without_memory(size: str, billions: float) -> None:
    """Language model plus SigLIP-so400m plus projector, on the meta device."""
    configuration = real_shapes.config(size, real_shapes.processor().tokenizer)
    assert worlds.parameter_count(configuration) / 1e9 == pytest.approx(billions, abs=0.1)
    assert configuration.image_seq_length == 729
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(configuration, dtype=torch.bfloat16)
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
