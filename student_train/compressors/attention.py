"""Multi-head cross-attention as the learned compressors use it."""

from __future__ import annotations

import torch
from torch import nn

HEAD_WIDTH = 128
INITIAL_STD = 0.02
"""Of fresh weights, as both papers' code has them (truncated at two deviations)."""


class CrossAttention(nn.Module):
    """``width`` split into heads of about ``HEAD_WIDTH``; queries ``[N, Q, width]``, keys and values ``[N, K, width]``."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(heads for heads in range(1, max(1, width // HEAD_WIDTH) + 1) if width % heads == 0)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            projection(states).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for projection, states in ((self.query, queries), (self.key, keys), (self.value, values))
        )
        read = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(read.transpose(-3, -2).flatten(-2))


def start_small(module: nn.Module) -> nn.Module:
    """Fresh linear maps: weights N(0, ``INITIAL_STD``) truncated, biases zero."""
    for one in module.modules():
        if isinstance(one, nn.Linear):
            nn.init.trunc_normal_(one.weight, std=INITIAL_STD, a=-2 * INITIAL_STD, b=2 * INITIAL_STD)
            if one.bias is not None:
                nn.init.zeros_(one.bias)
    return module
