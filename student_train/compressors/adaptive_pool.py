"""Average over s×s windows of patches, then the trained MLP projector (DeCo, arXiv 2405.20985; EM-KD's student).

No parameter of its own: the projector's weights keep their names and values, so a pretrained start stays useful.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from student_train.compressors import CompressorSpec, Site
from student_train.compressors.windows import settle_windows, split_windows, square_grid

NAME = "adaptive_pool"
PAPER = "DeCo, arXiv 2405.20985"
ELASTIC = False
CHOOSES_LAYERS = False
settle = settle_windows
grid = training_grid = square_grid


class AdaptivePool(nn.Module):
    """``[N, side², D]`` → ``[N, M, D_t]``."""

    def __init__(self, side: int, window: int, projector: Any):
        super().__init__()
        self.side, self.window = side, window
        self.linear_1, self.act, self.linear_2 = projector.linear_1, projector.act, projector.linear_2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        pooled = split_windows(features, self.side, self.window).mean(2)
        return self.linear_2(self.act(self.linear_1(pooled)))


def build(spec: CompressorSpec, site: Site, projector: nn.Module) -> nn.Module:
    return AdaptivePool(site.side, site.side // math.isqrt(spec.count), projector)
