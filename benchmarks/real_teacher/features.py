"""What the frozen tower sees of the training scenes, computed once and kept: bfloat16 [scenes, patches, D], a file a chunk."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.real_teacher.compose import build_image_processor
from pipelines.demo.render import render
from pipelines.demo.scenes import Scene, sample_scene

CHUNK = 512  # scenes a file


def chunk_scenes(seed: int, chunk: int) -> list[Scene]:
    """The scenes of one file: of the split that no held-out question is about."""
    rng = random.Random(f"real-teacher/{seed}/{chunk}")
    return [sample_scene(rng, "train") for _ in range(CHUNK)]


def see(model: Any, pictures: list[Any], threads: int = 1, batch: int = 16) -> torch.Tensor:
    """What the projector is given of pictures (PIL): bfloat16 [pictures, patches, D_vision]."""
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    processor = build_image_processor()

    @torch.no_grad()
    def states(part: list[Any]) -> torch.Tensor:
        pixels = processor(part, return_tensors="pt")["pixel_values"].to(tower.dtype)
        return tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:].bfloat16()

    with ThreadPoolExecutor(threads) as pool:
        return torch.cat(list(pool.map(states, [pictures[i : i + batch] for i in range(0, len(pictures), batch)])))


def kept_features(
    model: Any, folder: Path, scenes: int, seed: int, threads: int = 1
) -> tuple[list[Scene], torch.Tensor]:
    """(scenes, bfloat16 [scenes, patches, D_vision]); what a file in ``folder`` has is not computed again."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[Scene] = []
    parts = []
    for chunk in range(-(-scenes // CHUNK)):
        drawn += chunk_scenes(seed, chunk)
        file = folder / f"features-{seed}-{chunk:04d}.safetensors"
        if not file.exists():
            draft = file.with_suffix(".draft")
            save_file({"features": see(model, [render(one) for one in drawn[-CHUNK:]], threads)}, draft)
            draft.replace(file)
            print(f"features of {len(drawn)} scenes", flush=True)
        parts.append(load_file(file)["features"])
    return drawn[:scenes], torch.cat(parts)[:scenes]
