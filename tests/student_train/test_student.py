"""The student as a module: which parameters belong to which group, and that a saved one is plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.load_student import freeze_except, load_student, module_group, save_student
from student_train.student import RowForward
from teacher_cache.errors import CompatibilityError, KdcliError


def test_a_trained_and_saved_student_loads_in_plain_transformers(
    open_stage: Callable[..., Any], tiny_cache: Path, tiny_student: Path, tmp_path: Path
) -> None:
    """The same logits to the last bit, pictures included; other ones than before the training."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    trainer, batches_from = open_stage(tiny_cache, per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2)
    trainer.train(batches_from)
    _, processor = load_student(str(tiny_student), "sdpa")
    save_student(trainer.model.model, processor, tmp_path / "saved")
    inputs = next(iter(batches_from(0)))[1][0].batch.inputs
    models = [
        trainer.model.model.eval(),
        AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval(),
        AutoModelForImageTextToText.from_pretrained(tiny_student, dtype=torch.float32).eval(),
    ]
    with torch.inference_mode():
        ours, saved, start = (model(**inputs).logits for model in models)
    assert torch.equal(ours, saved) and not torch.allclose(ours, start)
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert again.chat_template == processor.chat_template
    text = ["<|user|>what?<|end|><|assistant|>"]
    assert again(text=text)["input_ids"] == processor(text=text)["input_ids"]
    assert models[1].generation_config.eos_token_id == again.tokenizer.eos_token_id


@pytest.mark.parametrize(
    "path, group",
    [
        ("model.multi_modal_projector.linear_1.weight", "projector"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "language_model"),
        ("lm_head.weight", "language_model"),
        ("model.vision_tower.encoder.layers.0.norm.weight", "vision_tower"),
        ("model.visual.merger.mlp.0.weight", "projector"),
        ("model.visual.blocks.0.attn.qkv.weight", "vision_tower"),
    ],
)
def test_module_groups(path: str, group: str) -> None:
    assert module_group(path) == group


def test_unknown_modules_and_empty_stages_are_refused() -> None:
    with pytest.raises(CompatibilityError, match=r"head\.weight belongs to no known module group"):
        module_group("model.head.weight")
    model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(2, 2)})
    model.config = None
    with pytest.raises(CompatibilityError, match="no parameters in projector"):
        freeze_except(model, ("projector",))


def test_a_missing_student_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(KdcliError, match=r"cannot be loaded.*give a model folder or a hub id") as caught:
        load_student(str(tmp_path / "absent"), "sdpa")
    assert "\n" not in str(caught.value)


def test_head_gram_follows_the_head(tiny_student: Path) -> None:
    """Made once where the head is frozen, with a gradient where it is trained, over the asked columns alone."""
    model, _ = load_student(str(tiny_student), "sdpa")
    student = RowForward(model.requires_grad_(False))
    first = student.head_gram(100)
    assert student.head_gram(100) is first
    torch.testing.assert_close(first, student.head[:100].T @ student.head[:100])
    assert not torch.equal(student.head_gram(None), first)
    model.requires_grad_(True)
    gram = student.head_gram(100)
    (gradient,) = torch.autograd.grad(gram.sum(), student.head)
    assert gradient[:100].any() and not gradient[100:].any()
