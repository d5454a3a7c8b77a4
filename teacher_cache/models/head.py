"""The language-model head in row chunks: top-k, exact tail and log Z, so a batch's logits never exist at once."""

from __future__ import annotations

import torch

from teacher_cache.signal_records import TopK

CHUNK_BYTES = 8 << 20
"""float32 logits of a chunk on a CPU: they stay in its caches over all passes (chunks of 64 MiB took a quarter longer)."""
LARGE_CHUNK_BYTES = 256 << 20
"""The same on a GPU, or where the vocabulary is so wide that a small chunk would read the head for a handful of rows."""
WIDE_VOCABULARY = 1 << 15
PIECE_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}
"""What element-wise passes take at a time, so that their temporaries stay small beside a chunk: in a CPU's caches, enough for a GPU."""


def chunk_rows(head_VD: torch.Tensor, chunk_bytes: int) -> int:
    """Rows of one chunk of logits; ``chunk_bytes`` counts for narrow heads on a CPU."""
    large = head_VD.is_cuda or head_VD.shape[0] >= WIDE_VOCABULARY
    return max(1, (LARGE_CHUNK_BYTES if large else chunk_bytes) // (4 * head_VD.shape[0]))


def head_logits(hidden_RD: torch.Tensor, head_VD: torch.Tensor, cap: float | None = None) -> torch.Tensor:
    """float32 ``[R, V]`` of h·Wᵀ with float32 accumulation *and* output, also where both are half precision.

    Args:
        cap: c of a head that caps its logits softly, c · tanh(h·Wᵀ / c); None: it does not.
    """
    if hidden_RD.is_cuda and hidden_RD.dtype == head_VD.dtype and hidden_RD.dtype != torch.float32:
        return cap_in_place(torch.mm(hidden_RD, head_VD.T, out_dtype=torch.float32), cap)
    return cap_in_place(hidden_RD.to(torch.float32) @ head_VD.to(torch.float32).T, cap)


def cap_in_place(products: torch.Tensor, cap: float | None) -> torch.Tensor:
    """c · tanh(products / c), overwriting ``products`` where no gradient is wanted; ``products`` itself where ``cap`` is None."""
    if cap is None:
        return products
    return (products / cap).tanh() * cap if products.requires_grad else products.div_(cap).tanh_().mul_(cap)


def slope_of_cap(capped: torch.Tensor, cap: float) -> torch.Tensor:
    """The derivative of ``cap_in_place`` where it said ``capped``: 1 − (capped / c)²."""
    return capped.div(cap).square_().neg_().add_(1.0)


def topk_rows(hidden_RD: torch.Tensor, head_VD: torch.Tensor, k: int, cap: float | None = None) -> TopK:
    """``TopK`` of every row, on the hidden states' device; ``cap`` as ``head_logits`` takes it.

    The tail is summed in logarithms over the entries outside the head themselves, not taken as 1 − Σp: exact to float32 in the
    logarithm however peaked the row (−200 stays −200), and in 1 − e^log_tail however flat.
    """
    k = min(k, head_VD.shape[0])
    rows = chunk_rows(head_VD, CHUNK_BYTES)
    chunks = [_topk_chunk(chunk, head_VD, k, cap) for chunk in hidden_RD.split(rows)] if len(hidden_RD) else []
    if not chunks:
        empty = hidden_RD.new_zeros((0, k), dtype=torch.float32)
        scalar = empty.new_zeros(0)
        return TopK(empty.to(torch.int64), empty, scalar, scalar)
    return TopK(*(torch.cat(column) for column in zip(*chunks)))


def _topk_chunk(hidden: torch.Tensor, head: torch.Tensor, k: int, cap: float | None) -> tuple[torch.Tensor, ...]:
    logits = head_logits(hidden, head, cap)
    top, ids = logits.topk(k, dim=1)
    peak = top[:, 0].clone()
    top = top - peak[:, None]
    log_head = top.logsumexp(dim=1)
    log_rest = _logsumexp_in_place(logits.scatter_(1, ids, -torch.inf)) - peak
    log_total = torch.logaddexp(log_head, log_rest)
    # log(rest / (head + rest)) of the difference: no rounding of a nearly full tail, no underflow of a nearly empty one.
    log_tail = torch.nn.functional.logsigmoid(log_rest - log_head)
    return ids, top - log_total[:, None], log_tail, log_total + peak


def piece_rows(values_RV: torch.Tensor) -> int:
    """Rows of one piece of an element-wise pass."""
    limit = PIECE_BYTES.get(values_RV.device.type, PIECE_BYTES["cpu"])
    return max(1, limit // (values_RV.element_size() * max(1, values_RV.shape[1])))


def log_softmax_in_place(logits_RV: torch.Tensor) -> torch.Tensor:
    """``logits.log_softmax(1)``, overwriting ``logits``; the only temporary is a piece."""
    for piece in logits_RV.split(piece_rows(logits_RV)):
        piece.copy_(torch.log_softmax(piece, dim=1))
    return logits_RV


def _logsumexp_in_place(values: torch.Tensor) -> torch.Tensor:
    """``values.logsumexp(dim=1)``, overwriting ``values``; -inf where every entry is."""
    largest = values.amax(dim=1).clamp_min(torch.finfo(values.dtype).min)
    return values.sub_(largest[:, None]).exp_().sum(dim=1).log() + largest
