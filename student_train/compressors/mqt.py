"""Matryoshka Query Transformer (arXiv 2405.19315): latent queries and one cross-attention; a prefix of the queries is enough.

As the released code has it: keys are places alone (sines and cosines of column and row, made for the queries' square grid and resized to
the patches'), values are features, queries have places of their own grid; heads of 64. So how much a query takes of a patch does not
depend on what the patch shows. The stages that train the language model draw an even count 2..largest for every step and keep so many
queries from the front; a stage of the projector alone uses all of them; inference keeps the first ``vision_tokens``. The map to the
language model's width is one linear map, all of it fresh (the trained projector is not used). Released weights load under their own
names.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from student_train.compressors import CompressorSpec, Site
from student_train.compressors.attention import INITIAL_STD, CrossAttention, start_small, take_released
from teacher_cache.errors import CompatibilityError

NAME = "mqt"
PAPER = "Matryoshka Query Transformer, arXiv 2405.19315"
ELASTIC = True
CHOOSES_LAYERS = False
VERSION = 2
"""Version 1, unmarked, had heads of 128, features in its keys and no places of queries: such a student says something else here."""
LARGEST = 256
HEAD_WIDTH = 64
RELEASED = {
    "query": "queries",
    "ln_q": "query_norm",
    "ln_k": "key_norm",
    "ln_v": "value_norm",
    "attn": "attention",
}
ROUNDED = 5e-3
"""Released places are in half precision, or bfloat16."""


def settle(spec: CompressorSpec, site: Site) -> CompressorSpec:
    patches = site.side**2
    root = math.isqrt(min(LARGEST, patches)) // 2 * 2
    largest = spec.largest or root**2
    asked = patches // 4 if spec.vision_tokens is None else spec.vision_tokens
    if not 4 <= largest <= patches or largest % 2 or math.isqrt(largest) ** 2 != largest:
        raise CompatibilityError(
            f"compressor {NAME}: the largest count must be an even square, from 4 to the {patches} patches"
        )
    most = min(largest, patches - 1)
    if not 1 <= asked <= most:
        raise CompatibilityError(
            f"compressor {NAME}: {asked} vision tokens of a {site.side}×{site.side} grid: choose --vision-tokens from 1 to {most}"
        )
    return replace(spec, vision_tokens=asked, largest=largest, version=VERSION)


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
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention = CrossAttention(width, HEAD_WIDTH)
        self.out = nn.Linear(width, text_width, bias=False)
        start_small(self)
        nn.init.trunc_normal_(self.queries, std=INITIAL_STD)
        nn.init.normal_(self.out.weight, std=text_width**-0.5)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        # Computed here and not a buffer: a buffer that is not saved would come back empty from from_pretrained.
        places = place_table(math.isqrt(self.largest), self.width, features)
        keys = self.key_norm(resized(places, self.side).to(features))
        queries = self.query_norm(self.queries[: self.keep] + places[: self.keep].to(self.queries))
        keys, queries = (one[None].expand(len(features), -1, -1) for one in (keys, queries))
        return self.out(self.attention(queries, keys, self.value_norm(features)))

    def draw(self, seed: int, step: int) -> int:
        """The count of a training step: even, 2..largest, the same on every process."""
        return 2 * int(np.random.default_rng([seed, step]).integers(1, self.largest // 2 + 1))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        take_released(state_dict, prefix, RELEASED)
        stored, out = (state_dict.pop(f"{prefix}{name}", None) for name in ("pos_embed", "proj"))
        if stored is not None:
            places = place_table(math.isqrt(self.largest), self.width, stored)
            if stored.shape != places.shape or (stored - places).abs().max() > ROUNDED:
                raise CompatibilityError(
                    f"compressor {NAME}: its weights have other positions than those of {self.largest} queries"
                )
        if out is not None:  # the other way round
            state_dict[f"{prefix}out.weight"] = out.T
        super()._load_from_state_dict(state_dict, prefix, *rest)


def place_table(side: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of a cell's column, then of its row, ``[side², width]``; the few channels beyond a multiple of four are zero.

    On the device of ``like``, in float32 or, where that is, float64.
    """
    quarter = width // 4
    dtype = torch.promote_types(like.dtype, torch.float32)
    cells, waves = (torch.arange(count, device=like.device, dtype=dtype) for count in (side, quarter))
    angles = cells[:, None] * 10_000.0 ** -(waves / max(1, quarter))
    one = torch.cat([angles.sin(), angles.cos()], 1)
    columns, rows = one[None].expand(side, -1, -1), one[:, None].expand(-1, side, -1)
    table = torch.cat([columns, rows], -1).flatten(0, 1)
    return nn.functional.pad(table, (0, width - table.shape[1]))


def resized(places: torch.Tensor, side: int) -> torch.Tensor:
    """``[n², width]`` → ``[side², width]``, bicubic."""
    own = math.isqrt(len(places))
    if own == side:
        return places
    image = places.T.reshape(1, -1, own, own)
    return nn.functional.interpolate(image, size=(side, side), mode="bicubic", align_corners=False)[0].flatten(1).T


def build(spec: CompressorSpec, site: Site, projector: nn.Module) -> nn.Module:
    width = site.vision_width * len(site.layers)
    return MQT(site.side, width, site.text_width, training_grid(spec)[1], spec.count)
