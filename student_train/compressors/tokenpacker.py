"""TokenPacker (arXiv 2407.02392): coarse queries that read fine, multi-layer detail, each from its own s×s region, then an MLP.

Queries: the last feature, bilinearly downsampled. Keys, values: several layers of the tower side by side, each through a two-layer
MLP. Fresh but for the last MLP, which starts as the trained projector's (the released code's is fresh too). Layers: the paper's 12, 16, 22
and 23 of CLIP-L, scaled to the student's own feature layer (of a tower of three: 2 and 3). Released weights load under their own names.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from student_train.compressors import CompressorSpec, Site
from student_train.compressors.attention import CrossAttention, start_small, take_released
from student_train.compressors.windows import settle_windows, split_windows, square_grid
from teacher_cache.errors import CompatibilityError

NAME = "tokenpacker"
PAPER = "TokenPacker, arXiv 2407.02392"
ELASTIC = False
CHOOSES_LAYERS = True
PAPER_LAYERS, PAPER_LAST = (12, 16, 22), 23
HEAD_WIDTH = 128
RELEASED = {
    "q_proj_1": "query",
    "k_proj_1": "key",
    "v_proj_1": "value",
    "ln_q_1": "query_norm",
    "ln_k_1": "key_norm",
    "ln_v_1": "value_norm",
    "clip_attn": "attention",
    "mlp.0": "linear_1",
    "mlp.2": "linear_2",
}
grid = training_grid = square_grid


def settle(spec: CompressorSpec, site: Site) -> CompressorSpec:
    layers = spec.layers or default_layers(site)
    outside = [layer for layer in layers if not -site.depth - 1 <= layer <= site.depth]
    if outside:
        raise CompatibilityError(
            f"compressor {NAME}: the vision tower has no layer {', '.join(map(str, outside))}: "
            f"choose vision_feature_layers from {-site.depth - 1} to {site.depth}"
        )
    return replace(settle_windows(spec, site), layers=tuple(layers))


def default_layers(site: Site) -> tuple[int, ...]:
    """Ascending, the student's own feature layer last; what a student reads that already reads several stays."""
    if len(site.layers) > 1:
        return site.layers
    last = site.layers[0] if site.layers[0] >= 0 else site.depth + 1 + site.layers[0]
    return tuple(sorted({round(layer * last / PAPER_LAST) for layer in PAPER_LAYERS} | {last}))


class TokenPacker(nn.Module):
    """``[N, side², layers·D_v]`` → ``[N, M, D_t]``."""

    def __init__(self, side: int, window: int, width: int, layers: int, projector: Any):
        super().__init__()
        self.side, self.window, self.width = side, window, width
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (
            nn.Sequential(nn.Linear(layers * width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(2)
        )
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention = CrossAttention(width, HEAD_WIDTH)
        start_small(self)
        self.linear_1, self.act, self.linear_2 = projector.linear_1, projector.act, projector.linear_2
        if self.linear_1.in_features != width:  # a projector that reads several layers at once
            self.linear_1 = start_small(nn.Linear(width, self.linear_2.in_features))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        queries = self.query_norm(self.query(self.downsample(features[..., -self.width :])))
        keys, values = (
            split_windows(norm(widen(features)), self.side, self.window).flatten(0, 1)
            for norm, widen in ((self.key_norm, self.key), (self.value_norm, self.value))
        )
        read = self.attention(queries.flatten(0, 1)[:, None], keys, values)
        return self.linear_2(self.act(self.linear_1(read.reshape(queries.shape))))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        take_released(state_dict, prefix, RELEASED)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def downsample(self, last: torch.Tensor) -> torch.Tensor:
        """``[N, side², D_v]`` → ``[N, M, D_v]``, bilinear."""
        image = last.transpose(1, 2).unflatten(2, (self.side, self.side))
        size = (self.side // self.window,) * 2
        # Contiguous: kernels of other programs, vLLM's on CPUs, want rows of numbers that follow one another.
        return nn.functional.interpolate(image, size, mode="bilinear").flatten(2).transpose(1, 2).contiguous()


def build(spec: CompressorSpec, site: Site, projector: nn.Module) -> nn.Module:
    window = site.side // math.isqrt(spec.count)
    return TokenPacker(site.side, window, site.vision_width, len(spec.layers), projector)
