"""The language-model head in row chunks: top-k, exact tail, log Z and mean logit, so a batch's logits never exist at once."""

from __future__ import annotations

import torch

from teacher_cache.records import TopK

CHUNK_BYTES = 64 << 20


def head_logits(hidden_RD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """float32 ``[R, V]`` of h·Wᵀ with float32 accumulation *and* output, also where both are half precision."""
    if hidden_RD.is_cuda and hidden_RD.dtype == head_VD.dtype and hidden_RD.dtype != torch.float32:
        return torch.mm(hidden_RD, head_VD.T, out_dtype=torch.float32)
    return hidden_RD.to(torch.float32) @ head_VD.to(torch.float32).T


def topk_rows(hidden_RD: torch.Tensor, head_VD: torch.Tensor, k: int) -> TopK:
    """``TopK`` of every row, on the hidden states' device.

    The tail is summed over the entries outside the head themselves, not taken as 1 − Σp: exact however peaked the row.
    """
    k = min(k, head_VD.shape[0])
    rows = max(1, CHUNK_BYTES // (4 * head_VD.shape[0]))
    chunks = [_topk_chunk(chunk, head_VD, k) for chunk in hidden_RD.split(rows)] if len(hidden_RD) else []
    if not chunks:
        empty = hidden_RD.new_zeros((0, k), dtype=torch.float32)
        scalar = empty.new_zeros(0)
        return TopK(empty.to(torch.int64), empty, scalar, scalar, scalar)
    return TopK(*(torch.cat(column) for column in zip(*chunks)))


def _topk_chunk(hidden: torch.Tensor, head: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    logits = head_logits(hidden, head)
    mean = logits.mean(dim=1)
    top, ids = logits.topk(k, dim=1)
    peak = top[:, :1]
    weights = (logits - peak).exp_()
    total = weights.sum(dim=1)
    tail = weights.scatter_(1, ids, 0.0).sum(dim=1)
    log_z = total.log() + peak[:, 0]
    return ids, top - log_z[:, None], tail.log() - total.log(), log_z, mean
