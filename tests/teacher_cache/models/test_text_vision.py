"""Text→vision attention against the model's own eager attention: batches, two pictures, text-only rows, chunks, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from teacher_cache.errors import CompatibilityError, KdcliError, SkipSample
from teacher_cache.models import text_vision
from teacher_cache.models.text_vision import decoder_layer, layer_inputs, text_vision_attention
from teacher_cache.preparing.batch import collate
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Prepared, Sample, Turn
from teacher_cache.sources import DataSpec, open_source
from teacher_cache.teachers.transformers import TransformersTeacher
from teacher_cache.wants import Wants
from tests.close import assert_all_close


@pytest.fixture(scope="module")
def rows(teacher_parts, world_json) -> list[Prepared]:
    """Chat rows without, with one and with two pictures."""
    preparer = Preparer(*teacher_parts)
    source = open_source(DataSpec("pairs", world_json.train, image_root=str(world_json.images)))
    words = Sample("pairs", 99, "", "", (Turn("user", "Which is larger, 3 or 4?"), Turn("assistant", "4")))
    found = {0: preparer.prepare(words, "chat")}
    for row in (row for group in source.scan(100) for row in source.read(group)):
        try:
            if isinstance(row, Sample):
                found.setdefault(len(row.images), preparer.prepare(row, "chat"))
        except SkipSample:
            continue
    assert set(found) == {0, 1, 2}
    return [found[images] for images in (0, 1, 2)]


@pytest.fixture(scope="module")
def eager(tiny_teacher: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        tiny_teacher, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def truth(eager: Any, one: Prepared, layer: int) -> torch.Tensor:
    """``[H, N, R]`` of the whole ``[H, T, T]`` that the model itself gives."""
    said = eager(input_ids=one.input_ids[None], **one.pixels, output_attentions=True).attentions[layer][0]
    return said[:, one.text_positions][:, :, one.vision_positions]


@torch.inference_mode()
@pytest.mark.parametrize("chunk_bytes", [text_vision.CHUNK_BYTES, 4000])
def test_the_teacher_against_eager_attention(
    teacher_model, teacher_parts, eager, rows, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_vision, "CHUNK_BYTES", chunk_bytes)
    assert teacher_model.config._attn_implementation == "sdpa"
    teacher = TransformersTeacher.wrap(teacher_model, teacher_parts[0])
    outputs = teacher(rows, Wants(attention={0: "each", 1: "mean"}, features=True))
    for one, said in zip(rows, outputs):
        each, mean = truth(eager, one, 0), truth(eager, one, 1).mean(dim=0, keepdim=True)
        assert said.attention[0].shape == (2, len(one.text_positions), len(one.vision_positions))
        torch.testing.assert_close(said.attention[0], each, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(said.attention[1], mean, atol=2e-6, rtol=1e-4)
        assert said.features is not None and said.features.shape == (len(one.vision_positions), 48)
        if len(one.vision_positions):
            pictures = eager.model.get_image_features(one.pixels["pixel_values"]).pooler_output
            torch.testing.assert_close(said.features, torch.cat(list(pictures)), atol=1e-5, rtol=1e-4)
            before = one.text_positions < one.vision_positions.min()
            assert before.any() and (said.attention[0][:, before] == 0).all()
            assert 0 < float(said.attention[0].sum(dim=2).max()) <= 1 + 1e-6


def test_gradients_are_those_of_eager_attention(teacher_model, eager, rows) -> None:
    """Through the projections of the layer and what is before it."""
    grads = []
    batch = collate(rows, 0)
    for model in (teacher_model, eager):
        model.requires_grad_(True)
        model.zero_grad()
        if model is eager:
            said = [truth(eager, one, 0) for one in rows]
        else:
            with layer_inputs(model, [0]) as seen:
                model.model(**batch.inputs, use_cache=False)
            said = text_vision_attention(model, 0, seen, batch)
        sum((one**2).sum() for one in said).backward()
        layer = model.model.language_model.layers[0]
        grads.append(
            [layer.self_attn.q_proj.weight.grad, layer.self_attn.k_proj.bias.grad, layer.input_layernorm.weight.grad]
        )
        grads[-1] += [next(model.model.multi_modal_projector.parameters()).grad.clone()]
        assert layer.self_attn.o_proj.weight.grad is None or not layer.self_attn.o_proj.weight.grad.any()
        model.zero_grad()
        model.requires_grad_(False)
    assert all(theirs.abs().max() > 0 for theirs in grads[1])
    assert_all_close(*grads, 1e-4)


def test_layers_that_cannot_be_read_are_refused_by_name(teacher_model, teacher_parts, rows) -> None:
    teacher = TransformersTeacher.wrap(teacher_model, teacher_parts[0])
    with pytest.raises(KdcliError, match="attention of layer 2: the model has layers 0 … 1"):
        teacher(rows[:1], Wants(attention={2: "each"}))
    with pytest.raises(CompatibilityError, match=r"has no model\.language_model\.layers"):
        decoder_layer(Bare(), 0)


class Bare(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(1, 1)
