"""The way of a real language model, on a tiny one: the table, the last line, and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import text_student
from tests.text_models import build_text_folder


def test_it_runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = build_text_folder(tmp_path / "teacher", layers=3)
    line = ["--teacher", str(teacher), "--work", str(tmp_path / "work"), "--layers", "2", "--rows", "24"]
    line += ["--held-out", "4", "--steps", "2"]
    text_student.main(line)
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(body["scores"]) == {"teacher", "start", "sft", "kd"} and body["response_tokens"] > 96
    assert set(body["seconds"]) == {"capture", "sft", "kd"} and all(body["bytes_per_response_token"].values())
    assert body["export"]["check"]["difference"] <= body["export"]["check"]["bound"]
    text_student.main(line)
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["scores"] == body["scores"] and again["seconds"]["kd"] < 2 * body["seconds"]["kd"] + 10


@torch.no_grad()
def test_the_layers_kept_are_the_teachers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for kind in ("llama", "qwen2", "gpt2"):
        model = AutoModelForCausalLM.from_pretrained(build_text_folder(tmp_path / kind, kind, layers=5))
        student = text_student.with_fewer_layers(model, 3)
        layers = [getattr(getattr(one, "model", None) or one.transformer, "layers", None) for one in (model, student)]
        layers = [one if one is not None else m.transformer.h for one, m in zip(layers, (model, student))]
        assert len(layers[1]) == 3
        for ours, kept in zip(layers[1], (0, 2, 4)):
            theirs = layers[0][kept].state_dict()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())
        assert torch.equal(student.get_output_embeddings().weight, model.get_output_embeddings().weight)
    with pytest.raises(ValueError, match="choose from 2 to 5"):
        text_student.with_fewer_layers(model, 9)
