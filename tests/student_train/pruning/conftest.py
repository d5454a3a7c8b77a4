"""A tiny LLaVA, and rows of every kind in one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

IMAGE, PAD, TOKENS = 5, 0, 16
"""Image token id, padding id, vision tokens an image."""
LAYERS = 6


def build(family: str = "Qwen2", implementation: str = "sdpa", layers: int = LAYERS, seed: int = 0) -> Any:
    """A LLaVA with random weights, 16 vision tokens an image, float32."""
    import transformers

    text = getattr(transformers, f"{family}Config")(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        vision_use_head=False,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=TOKENS,
    )
    torch.manual_seed(seed)
    return transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()


@pytest.fixture(scope="session")
def tiny_llava() -> Callable[..., Any]:
    """``tiny_llava(family="Qwen2", implementation="sdpa", layers=6)``: equal weights for every implementation."""
    return build


def text_ids(count: int, seed: int) -> list[int]:
    return torch.randint(10, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="session")
def samples() -> list[tuple[torch.Tensor, int]]:
    """(ids ``[T]``, images): image first; image in the middle; text only; two images with text between; a short row."""
    image = [IMAGE] * TOKENS
    rows = [
        (image + text_ids(9, 1), 1),
        (text_ids(6, 2) + image + text_ids(7, 3), 1),
        (text_ids(11, 4), 0),
        (text_ids(2, 5) + image + text_ids(3, 6) + image + text_ids(5, 7), 2),
        (text_ids(3, 8) + image + text_ids(2, 9), 1),
    ]
    return [(torch.tensor(ids), images) for ids, images in rows]


@pytest.fixture(scope="session")
def pictures(samples: list[tuple[torch.Tensor, int]]) -> list[torch.Tensor]:
    """Pixels of every sample ``[images, 3, 16, 16]``."""
    draw = torch.Generator().manual_seed(11)
    return [torch.randn(images, 3, 16, 16, generator=draw) for _, images in samples]


@pytest.fixture(scope="session")
def batch_of(samples: list[tuple[torch.Tensor, int]], pictures: list[torch.Tensor]) -> Callable[..., dict[str, Any]]:
    """``batch_of(left=False, which=None)`` → keyword arguments of ``model.model``, padded on one side."""

    def make(left: bool = False, which: list[int] | None = None) -> dict[str, Any]:
        which = list(range(len(samples))) if which is None else which
        length = max(len(samples[one][0]) for one in which)
        ids = torch.full((len(which), length), PAD)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(which):
            own = samples[one][0]
            at = slice(length - len(own), length) if left else slice(0, len(own))
            ids[row, at], mask[row, at] = own, 1
        pixels = torch.cat([pictures[one] for one in which])
        return {"input_ids": ids, "attention_mask": mask} | ({"pixel_values": pixels} if len(pixels) else {})

    return make
