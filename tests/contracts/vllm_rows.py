"""Rows of the contract with vLLM, the same on every machine: a text, a picture, two pictures; pixels drawn without any library's help."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Image, Prepared, Sample, Turn
from teacher_cache.wants import Wants

RECORDED = Path(__file__).parent / "vllm_recorded.safetensors"
VERSIONS = RECORDED.with_suffix(".json")
SIDE = 96  # as the tiny teacher sees pictures: nothing is resized
FLAT = ("start_indices", "end_indices", "token_ids", "logprobs")
TOPK = Wants(topk={"vision": 8, "response": 8})
WANTS = TOPK | Wants(hidden={"vision", "response", "text"}, gram=True)
BOUND = 1e-3
"""Nats between the log-probs of both backends in float32, and of log tails and log Z."""


def build_teacher(folder: Path) -> Path:
    """The tiny teacher, 64 wide: vLLM's attention on CPUs knows heads of 32 and more."""
    from tests.conftest import build_folder

    return build_folder(folder, text_width=64, vision_width=32, seed=1)


def contract_rows(processor: Any, config: Any) -> list[Prepared]:
    """Three rows as the tiny teacher reads them."""
    preparer = Preparer(processor, config)
    texts = [
        (("What is red and blue?", "a circle"), ("And green?", "a square"), 0),
        (("<image>\nWhat is this?", "a triangle"), ("Where?", "on the left"), 1),
        (("<image>\n<image>\nWhich one is red?", "the first one"), None, 2),
    ]
    rows = []
    for number, (first, second, pictures) in enumerate(texts):
        turns = [
            Turn(role, text) for pair in (first, second) if pair for role, text in zip(("user", "assistant"), pair)
        ]
        images = tuple(Image(f"{i}.png", picture(10 * number + i)) for i in range(pictures))
        rows.append(
            preparer.prepare(Sample("sft", number, str(number), f"contract row {number}", tuple(turns), images))
        )
    return rows


def picture(seed: int) -> bytes:
    """A PNG of coloured waves."""
    x, y = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    waves = [(x * (seed + 2 + c) + y * (3 + c)) % 256 for c in range(3)]
    file = io.BytesIO()
    PIL.Image.fromarray(np.stack(waves, axis=2).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def head_numbers(head: torch.Tensor) -> list[float]:
    """Of W ``[V, D]``, the mean magnitude and some entries: whether a contract was recorded with these weights.

    No hash: torch's normal numbers differ in their last bits by the vector instructions of the processor.
    """
    flat = head.double().flatten()
    return [float(flat.abs().mean()), *flat[:: len(flat) // 7].tolist()]


class Flat:
    """Flat log-probs as recorded."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], prefix: str):
        for name in FLAT:
            setattr(self, name, tensors[f"{prefix}.{name}"].tolist())

    start_indices: list[int]
    end_indices: list[int]
    token_ids: list[int]
    logprobs: list[float]


def tensors_of_flat(flat: Any, prefix: str) -> dict[str, torch.Tensor]:
    """What ``Flat`` reads back; log-probs are float32 with vLLM already."""
    dtypes = (torch.int32, torch.int32, torch.int32, torch.float32)
    return {f"{prefix}.{name}": torch.tensor(list(getattr(flat, name)), dtype=t) for name, t in zip(FLAT, dtypes)}
