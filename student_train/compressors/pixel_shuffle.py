"""Space to depth: the patches of each s×s window side by side in one wider token, then the MLP (InternVL 1.5, arXiv 2404.16821).

The first linear map is s² times wider. It starts as the projector's own, divided by s² and repeated, which is average pooling
before the trained projector: a fresh student says exactly what ``adaptive_pool`` says, and training tells the patches apart.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from student_train.compressors import CompressorSpec, Site
from student_train.compressors.windows import settle_windows, split_windows, square_grid

NAME = "pixel_shuffle"
PAPER = "InternVL 1.5, arXiv 2404.16821"
ELASTIC = False
CHOOSES_LAYERS = False
settle = settle_windows
grid = training_grid = square_grid


class PixelShuffle(nn.Module):
    """``[N, side², D]`` → ``[N, M, D_t]``; channels of a token: the window's patches in reading order."""

    def __init__(self, side: int, window: int, projector: Any):
        super().__init__()
        self.side, self.window = side, window
        narrow, patches = projector.linear_1, window * window
        self.linear_1 = nn.Linear(
            patches * narrow.in_features,
            narrow.out_features,
            bias=narrow.bias is not None,
            device=narrow.weight.device,
            dtype=narrow.weight.dtype,
        )
        with torch.no_grad():
            self.linear_1.weight.copy_(narrow.weight.repeat(1, patches) / patches)
            if narrow.bias is not None:
                self.linear_1.bias.copy_(narrow.bias)
        self.act, self.linear_2 = projector.act, projector.linear_2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        wide = split_windows(features, self.side, self.window).flatten(2)
        return self.linear_2(self.act(self.linear_1(wide)))


def build(spec: CompressorSpec, site: Site, projector: nn.Module) -> nn.Module:
    return PixelShuffle(site.side, site.side // math.isqrt(spec.count), projector)
