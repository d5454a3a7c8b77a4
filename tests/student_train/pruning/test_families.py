"""Other image-text models around the same text layers: tiles and newline tokens of anyres, pixel shuffle; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from student_train.pruning import Pruning
from student_train.pruning.forward import prune_vision
from teacher_cache.errors import CompatibilityError
from tests.close import assert_close
from tests.student_train.pruning.plain import pruned_states

ANYRES = {"pixel_values": torch.Size([1, 3, 3, 16, 16]), "tokens": 16 + 4 * 8 + 4}
"""An image of 16 × 32 pixels: one overview, two tiles, a newline token behind each of four rows."""


def text_config(family: str) -> Any:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 97, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.25}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    window = {"sliding_window": None} if family == "Mistral" else {}
    return getattr(transformers, f"{family}Config")(**sizes, **heads, **special, **window)


def vision_sizes(patch: Any = 4, image: Any = 16) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {**sizes, "image_size": image, "patch_size": patch}


def internvl() -> tuple[str, Any, torch.Size, int]:
    from transformers import InternVLConfig

    vision = vision_sizes([2, 2], [16, 16])
    config = InternVLConfig(
        text_config=text_config("Qwen3"), vision_config=vision, image_token_id=5, image_seq_length=16
    )
    return "InternVLForConditionalGeneration", config, torch.Size([1, 3, 16, 16]), 16


def onevision() -> tuple[str, Any, torch.Size, int]:
    from transformers import LlavaOnevisionConfig, SiglipVisionConfig

    config = LlavaOnevisionConfig(
        text_config=text_config("Qwen2"),
        vision_config=SiglipVisionConfig(**vision_sizes(), vision_use_head=False),
        image_token_id=5,
        image_grid_pinpoints=[[16, 32]],
        vision_feature_layer=-1,
    )
    return "LlavaOnevisionForConditionalGeneration", config, ANYRES["pixel_values"], ANYRES["tokens"]


def llava_next() -> tuple[str, Any, torch.Size, int]:
    from transformers import CLIPVisionConfig, LlavaNextConfig

    config = LlavaNextConfig(
        text_config=text_config("Mistral"),
        vision_config=CLIPVisionConfig(**vision_sizes()),
        image_token_id=5,
        image_grid_pinpoints=[[16, 32]],
        vision_feature_layer=-1,
    )
    return "LlavaNextForConditionalGeneration", config, ANYRES["pixel_values"], ANYRES["tokens"]


def build(make: Any, implementation: str) -> tuple[Any, dict[str, torch.Tensor], int]:
    import transformers

    name, config, shape, tokens = make()
    torch.manual_seed(1)
    model = getattr(transformers, name)._from_config(config, attn_implementation=implementation).eval()
    pixels = {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(2))}
    return model, pixels | ({"image_sizes": torch.tensor([[16, 32]])} if len(shape) == 5 else {}), tokens


@pytest.mark.parametrize("make", [internvl, onevision, llava_next])
@pytest.mark.parametrize("operator", ["dart", "fastv"])
@torch.no_grad()
def test_values_are_the_plain_ones(make: Any, operator: str) -> None:
    fast, pixels, tokens = build(make, "sdpa")
    slow, _, _ = build(make, "eager")
    ids = torch.tensor([7, 8] + [5] * tokens + [20, 21, 22, 23])
    pruning = Pruning(operator, layer=1, removed=0.6)
    with prune_vision(fast, pruning) as pruned:
        states = fast.model(input_ids=ids[None], **pixels, use_cache=False).last_hidden_state
    expected, rows = pruned_states(slow, ids, pixels, pruning, len(ids) - 1, 1)
    assert pruned.positions[0].tolist() == rows and len(rows) == len(ids) - tokens + Pruning(
        "dart" if operator == "dart" else "fastv", removed=0.6
    ).kept(tokens, 1)
    assert_close(states[0], expected, 5e-5)


@pytest.mark.parametrize("name", ["Qwen2_5_VLConfig", "Qwen3VLConfig"])
def test_several_rotary_positions_a_token_are_refused(name: str) -> None:
    import transformers

    with pytest.raises(CompatibilityError, match="vision tokens cannot be removed inside a qwen"):
        Pruning("random", 1, keep=2).check(getattr(transformers, name)())
