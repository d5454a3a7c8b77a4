"""Models of images and text, and of text alone: told apart by their configuration; what is neither, or broken, is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.load_student import open_student
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.models.head_form import head_form
from teacher_cache.models.kind import TextProcessor, decoder_of, open_config, open_processor, reads_images
from teacher_cache.teachers.backends import load_processor, teacher_reads_images
from teacher_cache.teachers.transformers import TeacherSpec
from tests.text_models import KINDS, build_text_folder


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_text_folder(tmp_path_factory.mktemp("kinds") / "llama")


def test_the_kind_is_that_of_the_configuration(text_folder: Path, tiny_teacher: Path) -> None:
    assert not reads_images(open_config("it", str(text_folder))) and reads_images(open_config("it", str(tiny_teacher)))
    processor, config = load_processor(TeacherSpec(str(text_folder)))
    assert isinstance(processor, TextProcessor) and config.model_type == "llama"
    assert not teacher_reads_images(TeacherSpec(f"null:{text_folder}"))
    assert teacher_reads_images(TeacherSpec(f"null:{tiny_teacher}"))
    assert isinstance(open_student(str(text_folder))[0], TextProcessor)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_head_reads_what_the_decoder_says(kind: str, tmp_path: Path) -> None:
    """Whatever an architecture calls its decoder: h·Wᵀ of its last hidden states are the model's own logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(build_text_folder(tmp_path / kind, kind), dtype=torch.float64).eval()
    ids = torch.randint(4, 4000, (2, 9), generator=torch.Generator().manual_seed(0))
    states = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    weight = head_form(model).weight(model.get_output_embeddings().weight)
    torch.testing.assert_close(states @ weight.T, model(input_ids=ids).logits, rtol=1e-9, atol=1e-9)


def test_texts_are_padded_without_a_pad_token(text_folder: Path) -> None:
    tokenizer = open_processor("it", str(text_folder))[0].tokenizer
    tokenizer.pad_token = None
    texts = ["<|user|>What is 1 plus 2?<|end|>", "<|user|>"]
    made = TextProcessor(tokenizer)(text=texts, padding=True, padding_side="left", add_special_tokens=False)
    own = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    length = len(own[0])
    assert made["input_ids"].tolist() == [own[0], [0] * (length - 1) + own[1]]
    assert made["attention_mask"].tolist() == [[1] * length, [0] * (length - 1) + [1]]
    right = TextProcessor(tokenizer)(text=texts, add_special_tokens=False)
    assert right["input_ids"][1].tolist() == own[1] + [0] * (length - 1)


def broken(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a model's folder; by file name: other content, None for a file that is gone."""
    shutil.copytree(folder, target)
    for name, content in changes.items():
        file = target / name.replace("__", ".")
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
    return target


def test_what_cannot_be_loaded_is_one_line(text_folder: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    vit = tmp_path / "vit"
    vit.mkdir()
    (vit / "config.json").write_text(json.dumps({"model_type": "vit"}))
    lines = {
        vit: "neither an image-text-to-text model nor a causal language model",
        broken(tiny_teacher, tmp_path / "absent", processor_config__json=None): "its folder has no image processor",
        broken(tiny_teacher, tmp_path / "cut", processor_config__json='{"image_processor": {'): "",
        broken(tiny_teacher, tmp_path / "odd", processor_config__json='{"image_processor": 5}'): "",
        broken(text_folder, tmp_path / "tokens", tokenizer__json='{"model": 5}'): "",
        broken(text_folder, tmp_path / "none", tokenizer__json=None, tokenizer_config__json=None): "",
    }
    for folder, said in lines.items():
        for role in ("model", "student"):
            with pytest.raises(KdcliError) as found:
                load_processor(TeacherSpec(str(folder))) if role == "model" else open_student(str(folder))
            line = str(found.value)
            assert said in line and str(folder) in line and "\n" not in line, line


def test_gguf_is_named(text_folder: Path, tmp_path: Path) -> None:
    alone, beside, whole = tmp_path / "alone", tmp_path / "beside", tmp_path / "whole"
    alone.mkdir()
    for folder in (beside, whole):
        shutil.copytree(text_folder, folder)
    (beside / "model.safetensors").unlink()
    for folder in (alone, beside, whole):
        (folder / "SmolLM2.Q4_1.gguf").write_bytes(b"GGUF")
    for place in (alone, beside, alone / "SmolLM2.Q4_1.gguf"):
        with pytest.raises(KdcliError, match=r"SmolLM2.Q4_1.gguf is a GGUF file.*docs/text.md"):
            load_processor(TeacherSpec(str(place)))
        with pytest.raises(KdcliError, match=r"SmolLM2.Q4_1.gguf is a GGUF file.*docs/text.md"):
            open_student(str(place))
    assert load_processor(TeacherSpec(str(whole)))[1].model_type == "llama"


def test_vllm_is_refused_for_a_language_model(text_folder: Path) -> None:
    with pytest.raises(CompatibilityError, match=r"is text-only.*--backend transformers"):
        load_processor(TeacherSpec(str(text_folder), backend="vllm"))
