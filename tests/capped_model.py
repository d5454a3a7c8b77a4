"""A tiny model whose logits are no plain product: PaliGemma, whose outer forward caps them softly, behind the tiny LLaVA's processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CAP = 3.0


def capped_config(like: Any, cap: float | None = CAP) -> Any:
    """Configuration with the vision tower and vocabulary of a tiny LLaVA's."""
    from transformers import Gemma2Config, PaliGemmaConfig

    text = Gemma2Config(
        vocab_size=like.text_config.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.2,  # logits far beyond the cap
        final_logit_softcapping=cap,
        attn_logit_softcapping=None,
        pad_token_id=like.text_config.pad_token_id,
        eos_token_id=like.text_config.eos_token_id,
        bos_token_id=None,
    )
    config = PaliGemmaConfig(
        vision_config=like.vision_config, text_config=text, projection_dim=32, image_token_id=like.image_token_id
    )
    config.pad_token_id, config.eos_token_id = like.text_config.pad_token_id, like.text_config.eos_token_id
    return config


def build_capped(folder: Path, like: Path, cap: float | None = CAP, seed: int = 4) -> Path:
    """A folder of that model with the processor of the folder ``like``."""
    from transformers import AutoConfig, AutoProcessor, PaliGemmaForConditionalGeneration

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PaliGemmaForConditionalGeneration(capped_config(AutoConfig.from_pretrained(like), cap))
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(like).save_pretrained(folder)
    return folder
