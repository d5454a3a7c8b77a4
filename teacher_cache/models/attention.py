"""Explicit attention of a few query rows of one decoder layer, whatever kernel the layer itself runs.

sdpa and flash kernels give no probabilities away. Where a few of them are wanted (which vision tokens a text token looks at), only
those query rows are computed again from the layer's input: norm, projections, rotary embedding, softmax in float32.

Shapes: B samples, T tokens, Q query rows, H heads, H_kv key heads, d width of a head, D width of the model.
"""

from __future__ import annotations

from typing import Any

import torch

from teacher_cache.errors import CompatibilityError
from teacher_cache.families.decoders import ATTENTION

KNOWN_ATTENTION = tuple(ATTENTION.values())


def check_attention(layer: Any) -> None:
    """CompatibilityError, by name, where a decoder layer computes its attention in another way than this file does."""
    attention: Any = getattr(layer, "self_attn", None)
    name = type(layer if attention is None else attention).__name__
    if name not in KNOWN_ATTENTION:
        raise CompatibilityError(
            f"attention of {name} cannot be computed apart: known are {', '.join(KNOWN_ATTENTION)} (one rotary position a token)"
        )
    if getattr(attention, "sliding_window", None) or getattr(attention.config, "sliding_window", None):
        raise CompatibilityError(f"attention of {name} with a sliding window cannot be computed apart: not supported")


def layer_attention(
    layer: Any,
    hidden: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    query_rows: torch.Tensor,
    valid: torch.Tensor,
) -> torch.Tensor:
    """Attention probabilities float32 ``[B, H, Q, T]``: causal by row, nothing on padding; with gradient where the caller has it on.

    Args:
        layer: a decoder layer. hidden: its input ``[B, T, D]``, before its norm.
        position_embeddings: cos and sin ``[B or 1, T, d]``, as the layer gets them. query_rows: int64 ``[B, Q]``, rows of ``hidden``.
        valid: bool ``[B, T]``, False on padding. A query row that sees nothing valid (padding itself) gets zeros.
    """
    check_attention(layer)
    cos, sin = _spread(position_embeddings, hidden)
    normed = layer.input_layernorm(hidden)
    keys = _rotated(layer.self_attn.k_proj, getattr(layer.self_attn, "k_norm", None), layer, normed, cos, sin)
    at = query_rows[:, :, None]
    asked = normed.gather(1, at.expand(-1, -1, normed.shape[2]))
    at = at.expand(-1, -1, cos.shape[2])
    queries = _rotated(
        layer.self_attn.q_proj,
        getattr(layer.self_attn, "q_norm", None),
        layer,
        asked,
        cos.gather(1, at),
        sin.gather(1, at),
    )
    shared = queries.shape[1] // keys.shape[1]
    rows = torch.arange(hidden.shape[1], device=hidden.device)
    seen = (rows <= query_rows[:, :, None]) & valid[:, None, :]
    # Autocast would round the scores to half precision before the softmax.
    with torch.autocast(hidden.device.type, enabled=False):
        grouped = queries.to(torch.float32).unflatten(1, (-1, shared))  # [B, H_kv, H/H_kv, Q, d]
        scores = torch.einsum("bgsqd,bgtd->bgsqt", grouped, keys.to(torch.float32)) * layer.self_attn.scaling
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        empty = ~seen.any(dim=2)[:, None, None, :, None]
        probs = scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
    return probs.flatten(1, 2)


def layer_keys(
    layer: Any, hidden: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """The layer's keys ``[B, H_kv, T, d]`` after the rotary embedding, in its compute dtype. Arguments as in ``layer_attention``."""
    check_attention(layer)
    cos, sin = _spread(position_embeddings, hidden)
    normed = layer.input_layernorm(hidden)
    return _rotated(layer.self_attn.k_proj, getattr(layer.self_attn, "k_norm", None), layer, normed, cos, sin)


def _spread(
    position_embeddings: tuple[torch.Tensor, torch.Tensor], hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, one a sample: ``[B, T, d]``."""
    cos, sin = position_embeddings
    if cos.ndim != 3:
        raise CompatibilityError(
            f"position embeddings of shape {tuple(cos.shape)}: several rotary positions a token (M-RoPE) are not supported"
        )
    return cos.expand(len(hidden), -1, -1), sin.expand(len(hidden), -1, -1)


def _rotated(
    projection: Any, norm: Any, layer: Any, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Queries or keys ``[B, heads, rows, d]``: projection, norm of each head where the family has one, rotary embedding."""
    heads = projection(normed).unflatten(2, (-1, layer.self_attn.head_dim))
    if norm is not None:
        heads = norm(heads)
    heads = heads.transpose(1, 2)
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return heads * cos[:, None] + turned * sin[:, None]
