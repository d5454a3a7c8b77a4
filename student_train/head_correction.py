"""What the exact head says of the sketch's error: coefficients corrected where a distribution is composed.

A sketch says y where the teacher has y + ε, |ε| ≤ Δ/2 in each dimension. The head knows K logits z of the row, and so ε along K rows
of W′. The best linear guess of ε is added to y, so that tokens that resemble the likeliest ones get a better logit too. No byte is
stored for it.

Letters: R rows, K entries of the head, r dimensions of the sketch, V tokens.
"""

from __future__ import annotations

import torch

from teacher_cache.models.low_rank import LowRankHead
from teacher_cache.signal_records import Sketch, TopK

HEAD_ERROR = 1 / 64
"""Standard deviation, in nats, of log-prob + log Z against y·W′ᵀ + b + m where y is exact: log-probs in steps of 1/64 (at p = 1), log Z in
steps of 1/32, W′ in bfloat16. Exact heads are few, and lose nothing by it: a sketch's error is ten times as large."""
LEAST_RIDGE = 1e-5
"""Of a row's largest diagonal entry: Cholesky in float32 stands that two tokens have the same row of W′."""
GATHERED_BYTES = 64 << 20
"""Of float32 rows of W′ that are gathered at a time."""


def corrected(sketch: Sketch, topk: TopK, head: LowRankHead) -> Sketch:
    """The sketch with coefficients y + W_Kᵀ (W_K W_Kᵀ + ρ)⁻¹ (z − y·W_Kᵀ − b − m), W_K ``[K, r]`` a row's tokens in W′.

    That is the mean of ε given z, if rounding errors are independent with variance Δ²/12 and the head's with ``HEAD_ERROR``²; ρ is the
    ratio of the two. Variances of single dimensions, where a symbol is zero and where it is not, were measured: KL is the same. Entries
    without a finite value say nothing.

    Args:
        head: of a sketch in steps of ``head.step``; where that is None the sketch comes back as it is.
    """
    if head.step is None or not topk.ids.numel():
        return sketch
    ridge = 12 * (HEAD_ERROR / head.step) ** 2
    rows = max(1, GATHERED_BYTES // (4 * topk.ids.shape[1] * head.weight.shape[1]))
    pieces = [
        _corrected(sketch[start : start + rows], topk[start : start + rows], head, ridge)
        for start in range(0, len(topk), rows)
    ]
    return Sketch(torch.cat(pieces), sketch.mean_logit)


def _corrected(sketch: Sketch, topk: TopK, head: LowRankHead, ridge: float) -> torch.Tensor:
    """float32 ``[R, r]``."""
    coefficients = sketch.coefficients.to(torch.float32)
    weight_RKr = head.weight[topk.ids].to(torch.float32)
    known = torch.baddbmm(head.bias[topk.ids][:, :, None], weight_RKr, coefficients[:, :, None])[:, :, 0]
    missing_RK = topk.log_probs + (topk.log_z - sketch.mean_logit)[:, None] - known
    told = torch.isfinite(missing_RK)
    weight_RKr = weight_RKr * told[:, :, None]
    products_RKK = weight_RKr @ weight_RKr.mT
    diagonal = products_RKK.diagonal(dim1=1, dim2=2)
    diagonal += (LEAST_RIDGE * diagonal.amax(dim=1, keepdim=True)).clamp_min(ridge)
    factor = torch.linalg.cholesky_ex(products_RKK).L
    shares_RK1 = torch.cholesky_solve(torch.where(told, missing_RK, 0.0)[:, :, None], factor)
    return torch.baddbmm(coefficients[:, None], shares_RK1.mT, weight_RKr)[:, 0]
