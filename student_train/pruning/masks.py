"""Attention masks of sequences that lost tokens, as each attention implementation wants them."""

from __future__ import annotations

import torch


def attention_mask(valid: torch.Tensor, queries: int, implementation: str, dtype: torch.dtype) -> torch.Tensor | None:
    """Causal by row, nothing on padding; a row always sees itself, so that padding rows stay finite.

    Args:
        valid: bool ``[B, T]`` over keys. queries: the last so many rows ask (T without a cache).

    Returns:
        sdpa: bool ``[B, 1, Q, T]``; eager: the same, additive in ``dtype``; flash: bool ``[B, T]``. None where sdpa or flash do the
        same without a mask, and faster.
    """
    whole = bool(valid.all())
    if implementation.startswith("flash"):
        return None if whole else valid
    length = valid.shape[1]
    if implementation == "sdpa" and whole and queries in (1, length):
        return None
    key = torch.arange(length, device=valid.device)
    query = key[length - queries :, None]
    seen = ((key <= query) & valid[:, None, :]) | (key == query)
    seen = seen[:, None]
    if implementation == "sdpa":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=valid.device).masked_fill(~seen, torch.finfo(dtype).min)
