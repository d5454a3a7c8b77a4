"""The real teacher's making, on tiny ends: names of an ONNX file's matrices, the folder, training that moves the projector alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.real_teacher import compose, features, lessons, score, train, vision
from benchmarks.text_student import with_fewer_layers
from pipelines.demo.render import render
from pipelines.demo.scenes import sample_scene
from tests.text_models import build_text_folder


@pytest.fixture(scope="module")
def tower() -> Any:
    """A ``Dinov2Model`` 64 wide with 4 layers and a table of 4 × 4 places, so that 8 × 8 patches are interpolated."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 1, "mlp_ratio": 2, "image_size": 56}
    return Dinov2Model(Dinov2Config(patch_size=14, use_mask_token=False, initializer_range=0.2, **sizes)).eval()


@pytest.fixture(scope="module")
def ends(tower: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tiny ends: the tower and a Llama of two layers, 32 wide, with the demo's words and SmolLM2's marks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("real")
    language = build_text_folder(folder / "language")
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    model = compose.compose(tower, AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32), tokenizer)
    compose.write_folder(model, tokenizer, folder / "ends")
    return folder / "ends"


def exported(tower: Any, folder: Path) -> tuple[dict[str, np.ndarray], list[vision.Node]]:
    """The constants and operations that an ONNX exporter makes of a tower: key before query, matrices without names."""
    tower.save_pretrained(folder)
    state = {name: one.numpy() for name, one in load_file(folder / "model.safetensors").items()}
    places = state.pop("embeddings.position_embeddings")
    constants = {"onnx::Concat_1": places[:, :1], "onnx::Reshape_2": places[:, 1:]}
    matrices = [name for name, one in state.items() if one.ndim == 2 and name.endswith(".weight")]
    nodes = []
    for number, name in enumerate(sorted(matrices, reverse=True)):
        constants[f"onnx::MatMul_{number}"] = state.pop(name).T
        bias = vision.PREFIX + name.removesuffix("weight") + "bias"
        nodes.append(vision.Node("MatMul", (f"x{number}", f"onnx::MatMul_{number}"), (f"y{number}",)))
        nodes.append(vision.Node("Add", (bias, f"y{number}"), (f"z{number}",)))
    nodes.append(vision.Node("MatMul", ("queries", "keys"), ("attention",)))
    return constants | {vision.PREFIX + name: one for name, one in state.items()}, nodes


@torch.no_grad()
def test_matrices_are_named_by_the_bias_of_their_product(tower: Any, tmp_path: Path) -> None:
    constants, nodes = exported(tower, tmp_path)
    model = vision.build_model(vision.backbone_state(constants, nodes))
    pixels = torch.randn(2, 3, 112, 112)
    assert torch.equal(model(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    with pytest.raises(ValueError, match="onnx::MatMul_0 has no bias"):
        vision.backbone_state(constants, nodes[:1] + nodes[2:])
    with pytest.raises(ValueError, match="position tables"):
        vision.backbone_state({name: one for name, one in constants.items() if "Concat" not in name}, nodes)
    del constants[vision.PREFIX + "layernorm.bias"]
    with pytest.raises(ValueError, match=r"not those of a Dinov2Model.*layernorm\.bias"):
        vision.build_model(vision.backbone_state(constants, nodes))


def test_the_folder_is_a_teacher(ends: Path, tmp_path: Path, world: Any, make_request: Callable[..., Any]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from pipelines.capture.cache_teacher import capture
    from teacher_cache.sources import DataSpec

    processor = AutoProcessor.from_pretrained(ends)
    encoder = lessons.Encoder(processor.tokenizer, processor.image_token_id, 64)
    rng = random.Random(0)
    for _ in range(40):
        scene = sample_scene(rng, "train")
        turns = lessons.draw_turns(scene, rng)
        if turns[0].family == lessons.PLAIN:
            continue
        talk = []
        for i, turn in enumerate(turns):
            asked = [{"type": "image"}] * (i == 0) + [{"type": "text", "text": turn.question}]
            talk += [{"role": "user", "content": asked}, {"role": "assistant", "content": turn.answer}]
        text = processor.apply_chat_template(talk)
        assert encoder.row(turns)[0] == list(processor(text=text, images=render(scene))["input_ids"][0])
    request = make_request(
        tmp_path / "cache", teacher=ends, data=[DataSpec("sft", world.train)], shards=1, fields=("response_topk",)
    )
    assert capture(request)["columns"]["samples"]["rows"] == 21
    model = AutoModelForImageTextToText.from_pretrained(ends, dtype=torch.float32)
    student = with_fewer_layers(model, 2)
    assert len(student.model.vision_tower.encoder.layer) == 4


def test_only_the_projector_learns_and_a_stopped_run_goes_on(
    ends: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(features, "CHUNK", 24)
    line = ["--teacher", str(ends), "--scenes", "24", "--word-steps", "3", "--rows", "4", "--save-seconds", "0"]
    line += ["--steps", "4"]
    whole = train.Trainer(train.parse([*line, "--work", str(tmp_path / "whole"), "--threads", "2"]))
    before = {name: one.clone() for name, one in whole.model.state_dict().items()}
    whole.run()
    moved = {name for name, one in whole.model.state_dict().items() if not torch.equal(one, before[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name}

    stopped = train.parse([*line, "--work", str(tmp_path / "stopped"), "--threads", "1"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        step = train.Trainer.answer_step

        def until_two(trainer: train.Trainer, index: int) -> tuple[float, int]:
            if index == 2:
                raise KeyboardInterrupt
            return step(trainer, index)

        patch.setattr(train.Trainer, "answer_step", until_two)
        train.Trainer(stopped).run()
    assert train.Trainer(stopped).progress.step == 2
    train.Trainer(stopped).run()
    files = [tmp_path / name / "projector.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    stopped.rows = 5
    with pytest.raises(ValueError, match="take another --work"):
        train.Trainer(stopped)

    compose.load_projector(whole.model, files[0])
    with pytest.raises(ValueError, match="train one for them"):
        compose.load_projector(whole.model, compose.PROJECTOR)
    score.main(["--teacher", str(ends), "--captions", "3", "--questions", "2", "--examples", "1"])
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(body["captions"]) == {"teacher", "blank_image", "other_image"} and len(body["questions"]) == 6


def test_the_shipped_projector_fits_its_ends() -> None:
    state = load_file(compose.PROJECTOR)
    shapes = {name: list(one.shape) for name, one in state.items()}
    wanted = {
        "linear_1.weight": [576, 384],
        "linear_1.bias": [576],
        "linear_2.weight": [576, 576],
        "linear_2.bias": [576],
    }
    assert shapes == wanted and {one.dtype for one in state.values()} == {torch.bfloat16}
    assert all(bool(one.isfinite().all()) for one in state.values()) and compose.PROJECTOR.stat().st_size < 2e6
