"""Matryoshka Query Transformer (arXiv 2405.19315): latent queries and one cross-attention; a prefix of the queries is enough.

Training draws an even count 2..largest for every step and keeps so many queries from the front; inference keeps the first
``vision_tokens``. The map to the language model's width is one linear map, all of it fresh (the trained projector is not used).
Keys are features with their place; the released code attends by place alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from student_train.compressors import CompressorSpec, Site
from student_train.compressors.attention import INITIAL_STD, CrossAttention, start_small
from teacher_cache.errors import CompatibilityError

NAME = "mqt"
PAPER = "Matryoshka Query Transformer, arXiv 2405.19315"
ELASTIC = True
CHOOSES_LAYERS = False
LARGEST = 256


def settle(spec: CompressorSpec, site: Site) -> CompressorSpec:
    patches = site.side**2
    largest = spec.largest or min(LARGEST, patches // 2 * 2)
    asked = patches // 4 if spec.vision_tokens is None else spec.vision_tokens
    if not 2 <= largest <= patches or largest % 2:
        raise CompatibilityError(f"compressor {NAME}: the largest count must be even, from 2 to the {patches} patches")
    most = min(largest, patches - 1)
    if not 1 <= asked <= most:
        raise CompatibilityError(
            f"compressor {NAME}: {asked} vision tokens of a {site.side}×{site.side} grid: choose --vision-tokens from 1 to {most}"
        )
    return replace(spec, vision_tokens=asked, largest=largest)


def grid(spec: CompressorSpec) -> tuple[int, int]:
    """Queries have no place in the picture: one row."""
    return 1, spec.count


def training_grid(spec: CompressorSpec) -> tuple[int, int]:
    assert spec.largest is not None, "settle the spec first"
    return 1, spec.largest


class MQT(nn.Module):
    """``[N, side², D]`` → ``[N, keep, D_t]``.

    Attributes:
        keep: queries from the front that the next forward keeps. largest: how many there are.
    """

    def __init__(self, side: int, width: int, text_width: int, largest: int, keep: int):
        super().__init__()
        self.side, self.width, self.largest, self.keep = side, width, largest, keep
        self.queries = nn.Parameter(torch.empty(largest, width))
        nn.init.trunc_normal_(self.queries, std=INITIAL_STD)
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention = CrossAttention(width)
        self.out = nn.Linear(width, text_width, bias=False)
        start_small(self)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        # Computed here and not a buffer: a buffer that is not saved would come back empty from from_pretrained.
        places = place_table(self.side, self.width).to(features)
        queries = self.query_norm(self.queries[: self.keep])[None].expand(len(features), -1, -1)
        read = self.attention(queries, self.key_norm(features + places), self.value_norm(features))
        return self.out(read)

    def draw(self, seed: int, step: int) -> int:
        """The count of a training step: even, 2..largest, the same on every process."""
        return 2 * int(np.random.default_rng([seed, step]).integers(1, self.largest // 2 + 1))


def place_table(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of a patch's row and column ``[side², width]``; the few channels beyond a multiple of four are zero."""
    quarter = width // 4
    waves = torch.arange(side)[:, None] * 10_000.0 ** -(torch.arange(quarter) / max(1, quarter))
    one = torch.cat([waves.sin(), waves.cos()], 1)
    rows, columns = one[:, None].expand(-1, side, -1), one[None].expand(side, -1, -1)
    table = torch.cat([rows, columns], -1).flatten(0, 1)
    return nn.functional.pad(table, (0, width - table.shape[1]))


def build(spec: CompressorSpec, site: Site, projector: nn.Module) -> nn.Module:
    width = site.vision_width * len(site.layers)
    return MQT(site.side, width, site.text_width, training_grid(spec)[1], spec.count)
