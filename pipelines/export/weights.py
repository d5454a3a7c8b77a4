"""Weights of an exported folder: rounded to the asked dtype, under the names that published checkpoints have."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers whose published weights lie below ``vision_model.``; transformers of today writes them without and reads both."""
_BARE = re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)")
MAX_SHARD_BYTES = "5GB"


def round_weights(model: Any, dtype: torch.dtype) -> None:
    """Parameters alone: buffers (rotary frequencies) are computed anew wherever the folder is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def save_stock(model: Any, folder: Path) -> None:
    """Weights, configuration and generation configuration of a student that transformers knows."""
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_BYTES)
    if getattr(getattr(model.config, "vision_config", None), "model_type", None) in TOWERS:
        rename_files(folder)


def save_own(model: Any, folder: Path) -> None:
    """The same of a package: its classes name the weights, so no renaming of transformers takes part."""
    from huggingface_hub import save_torch_state_dict

    tied = getattr(model.config, "tie_word_embeddings", False)
    state = {name: one for name, one in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    save_torch_state_dict(state, folder, max_shard_size=MAX_SHARD_BYTES)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def published_name(name: str) -> str:
    """``vision_tower.encoder…`` → ``vision_tower.vision_model.encoder…``, as vLLM and older releases expect it."""
    return _BARE.sub(r"\1vision_model.", name)


def rename_files(folder: Path) -> None:
    """``published_name`` for every weight of a saved folder; a shard at a time is in memory."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
            tensors = {published_name(name): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        draft = file.with_name(f".{file.name}")
        save_file(tensors, draft, metadata=metadata)
        os.replace(draft, file)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        body = json.loads(index.read_text())
        body["weight_map"] = {published_name(name): file for name, file in sorted(body["weight_map"].items())}
        index.write_text(json.dumps(body, indent=2) + "\n")
