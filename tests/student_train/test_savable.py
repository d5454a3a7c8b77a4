"""Whether a student can be saved is known before its first step, in one line that names what is to be mended."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from student_train import savable
from student_train.load_student import load_student, save_student
from student_train.savable import check_savable, refuse_quantized
from teacher_cache.errors import CompatibilityError, KdcliError


@pytest.fixture
def student(tiny_student: Path) -> tuple[Any, Any]:
    return load_student(str(tiny_student), "sdpa")


def tie(model: Any, processor: Any) -> None:
    model.model.multi_modal_projector.linear_2.bias = model.model.multi_modal_projector.linear_1.bias


def sampling(model: Any, processor: Any) -> None:
    model.generation_config.temperature = 0.5


def short(model: Any, processor: Any) -> None:
    model.generation_config.max_new_tokens = -1


def config(model: Any, processor: Any) -> None:
    model.config.loss = torch.nn.Linear(1, 1)


def processors(model: Any, processor: Any) -> None:
    processor.image_processor.resize = object()


def quantizer(model: Any, processor: Any) -> None:
    from transformers.quantizers import AutoHfQuantizer

    model.hf_quantizer = AutoHfQuantizer.from_config({"quant_method": "gguf"}, pre_quantized=True)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (tie, "the model cannot be saved .*shared tensors.*linear_1.bias"),
        (sampling, "generation_config.json cannot be saved .*do_sample"),
        (short, "generation_config.json cannot be saved .*max_new_tokens"),
        (config, "config.json cannot be saved "),
        (processors, "the processor cannot be saved "),
        (quantizer, "the model cannot be saved .*quantized with gguf"),
    ],
)
def test_what_cannot_be_saved(
    spoil: Callable[[Any, Any], None], said: str, student: tuple[Any, Any], tmp_path: Path
) -> None:
    """What ``save_student`` refuses behind the stage is refused before it, and no trace is left."""
    spoil(*student)
    with pytest.raises(KdcliError, match=f"^runs/student: {said}") as caught:
        check_savable(*student, tmp_path / "01-SFT", "runs/student")
    assert "\n" not in str(caught.value) and not list((tmp_path / "01-SFT").iterdir())
    with pytest.raises(Exception):  # noqa: B017 (of transformers, of any kind)
        save_student(*student, tmp_path / "model")


def test_what_can(student: tuple[Any, Any], tmp_path: Path) -> None:
    """Tied embeddings, and views of one memory that do not overlap."""
    model, processor = student
    both = torch.zeros(2 * model.model.multi_modal_projector.linear_1.bias.numel())
    half = len(both) // 2
    model.model.multi_modal_projector.linear_1.bias = torch.nn.Parameter(both[:half])
    model.model.multi_modal_projector.linear_2.bias = torch.nn.Parameter(both[half:])
    check_savable(model, processor, tmp_path, "student")
    assert not list(tmp_path.iterdir())
    save_student(model, processor, tmp_path / "model")


def test_where_it_goes(student: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(KdcliError, match="model is a file, and the student goes there"):
        check_savable(*student, tmp_path, "student")
    (tmp_path / "model").unlink()
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(savable.shutil, "disk_usage", lambda folder: full)
    with pytest.raises(KdcliError, match=r"0\.0 GB are free, the student takes 0\.0 GB: make room"):
        check_savable(*student, tmp_path, "student")


def with_quantization(student: Path, folder: Path, body: Any, where: str = "") -> Path:
    shutil.copytree(student, folder)
    config = json.loads((folder / "config.json").read_text())
    (config[where] if where else config)["quantization_config"] = body
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("where", ["", "text_config"])
@pytest.mark.parametrize("method", ["fp8", "awq", "gguf", "bitsandbytes"])
def test_quantized_weights_are_refused_by_their_configuration(
    method: str, where: str, tiny_student: Path, tmp_path: Path
) -> None:
    body = {"quant_method": method} | ({"load_in_4bit": True} if method == "bitsandbytes" else {})
    folder = with_quantization(tiny_student, tmp_path / "student", body, where)
    with pytest.raises(CompatibilityError, match="remove quantization_config where the weights are whole") as caught:
        refuse_quantized(AutoConfig.from_pretrained(folder), str(folder))
    assert re.search(rf"quantization_config: {method}", str(caught.value))


@pytest.mark.parametrize("body", [{}, {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}])
def test_a_configuration_that_quantizes_nothing(body: dict[str, Any], tiny_student: Path, tmp_path: Path) -> None:
    folder = with_quantization(tiny_student, tmp_path / "student", body)
    refuse_quantized(AutoConfig.from_pretrained(folder), str(folder))
    check_savable(*load_student(str(folder), "sdpa"), tmp_path / "run", "student")
