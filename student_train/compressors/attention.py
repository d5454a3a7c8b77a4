"""Multi-head cross-attention as the learned compressors use it, their fresh weights, and the names of their released ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

INITIAL_STD = 0.02
"""Of fresh linear maps, as both papers' code has them: its truncation at ±2 cuts nothing off a deviation of 0.02."""
RELEASED_PLACES = ("model.mm_projector.", "mm_projector.", "model.query_abstractor.", "query_abstractor.")
"""What stands before the weights' names in released files."""


class CrossAttention(nn.Module):
    """``width`` split into heads of about ``head_width``; queries ``[N, Q, width]``, keys and values ``[N, K, width]``."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.heads = max(heads for heads in range(1, max(1, width // head_width) + 1) if width % heads == 0)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            projection(states).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for projection, states in ((self.query, queries), (self.key, keys), (self.value, values))
        )
        read = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(read.transpose(-3, -2).flatten(-2))


def start_small(module: nn.Module) -> nn.Module:
    """Fresh weights as the papers' code has them: linear maps N(0, ``INITIAL_STD``), biases zero.

    An attention's queries, keys and values, one matrix in torch's own module there, are uniform by Xavier's rule for that matrix.
    """
    for one in module.modules():
        if isinstance(one, nn.Linear):
            nn.init.trunc_normal_(one.weight, std=INITIAL_STD)
            if one.bias is not None:
                nn.init.zeros_(one.bias)
    for one in module.modules():
        if isinstance(one, CrossAttention):
            reach = math.sqrt(6 / (4 * one.query.in_features))
            for projection in (one.query, one.key, one.value):
                nn.init.uniform_(projection.weight, -reach, reach)
    return module


def take_released(state: dict[str, torch.Tensor], prefix: str, names: Mapping[str, str]) -> None:
    """Give released weights our names, in place; a state dict that has ours already is left as it is.

    Args:
        prefix: of the compressor's weights in ``state``. names: beginning of a released name → of ours; an attention's ``in_proj_*``, which
            is queries, keys and values in one, becomes three.
    """
    for name in list(state):
        if not prefix and (place := next((one for one in RELEASED_PLACES if name.startswith(one)), "")):
            state[name.removeprefix(place)] = state.pop(name)
    for name in [name for name in state if name.startswith(prefix)]:
        own = name[len(prefix) :]
        known = next((one for one in names if own == one or own.startswith(one + ".")), None)
        if known is None:
            continue
        new, tensor = prefix + names[known] + own[len(known) :], state.pop(name)
        start, packed, kind = new.partition("in_proj_")
        if packed:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3)):
                state[f"{start}{part}.{kind}"] = piece
        else:
            state[new.replace(".out_proj.", ".out.")] = tensor
