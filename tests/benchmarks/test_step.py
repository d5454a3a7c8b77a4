from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks import real_shapes, step, worlds
from benchmarks.step_variants import CACHED, COMPACT, EXACT, LIVE, SFT, STANDARD, VARIANTS


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_variants_with_ratios_memory_and_decoding(
    tiny_models: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_process = step.memory_in_subprocess

    def mostly_here(name: str, options: Any, url: str) -> dict[str, float]:
        if name == LIVE:
            return own_process(name, options, url)
        arguments = ["--models", tiny_models, "--batch", "6", "--memory-of", name, "--cache", url]
        return step.peak_memory(step.parse(arguments))

    monkeypatch.setattr(step, "memory_in_subprocess", mostly_here)  # a process costs seconds of imports
    step.main(["--models", tiny_models, "--batch", "6", "--steps", "2", "--repeats", "1"])
    body = last_line(capsys)
    assert set(body["memory_mib"]) == set(body["gflop_a_step"]) == set(VARIANTS)
    assert all(0 < one["before"] <= one["peak"] for one in body["memory_mib"].values())
    flops, losses = body["gflop_a_step"], body["loss_of_a_step"]
    assert flops[SFT] < flops[COMPACT] < min(flops[STANDARD], flops[EXACT]) and flops[EXACT] < flops[LIVE]
    # Fewer dimensions than exact, and the products by which the head corrects the sketch: a few percent at this size.
    assert flops[STANDARD] < 1.05 * flops[EXACT]
    assert losses[EXACT] == pytest.approx(losses[LIVE], rel=2e-3)  # the same losses, but for the cache's bfloat16
    assert losses[STANDARD] == pytest.approx(losses[LIVE], rel=1e-2)
    assert losses[COMPACT] <= losses[EXACT] + 1e-3
    assert body["ratios"]["live / exact"]["operations"] == pytest.approx(flops[LIVE] / flops[EXACT], rel=0.05)
    assert set(body["decode"]) == set(CACHED)
    assert all(one["ms a batch"] > 0 and one["of its own step"] > 0 for one in body["decode"].values())


@pytest.mark.usefixtures("small_real_shapes")
def test_real_shapes_run_when_they_are_narrow(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(name: str, options: Any, url: str) -> dict[str, float]:
        options = step.parse(["--shapes", "real", "--batch", "4", "--steps", "2", "--memory-of", name, "--cache", url])
        return step.peak_memory(options)

    monkeypatch.setattr(step, "memory_in_subprocess", here)  # a process of its own would build the full widths
    step.main(["--shapes", "real", "--batch", "4", "--steps", "2", "--repeats", "1"])
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
