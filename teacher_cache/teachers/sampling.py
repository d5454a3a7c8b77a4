"""Unbiased samples of the head's distribution, in row chunks: a few ids a row with weights, E[Σ w_i f(i)] = Σ p_i f(i) for every f.

- ``random``: N draws with replacement, weight = count / N (Sparse Logit Sampling, arXiv 2503.16870).
- ``threshold``: k ids, the estimate of least variance for that many (VarOpt, arXiv 0803.0473, eq. 1): with τ such that
  Σ min(1, p_i / τ) = k, id i is kept with probability π_i = min(1, p_i / τ) and weighs p_i / π_i = max(p_i, τ): ids above τ are
  exact, all others weigh the same. Drawn systematically, one uniform a row, so that it is always k ids, and the weights sum to 1.

Uniforms are a pure function of (seed, row key, kind, row number), made on the CPU: no batch, worker or device has a say in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from teacher_cache.models.head import CHUNK_BYTES, chunk_rows, head_logits
from teacher_cache.signal_records import Sampled
from teacher_cache.wants import Wants

_SURE = 1 - 1e-9
"""Ids this close to τ count as above it: two steps of a systematic sample must not meet in one id by rounding."""
_LOWEST = -1e4
"""Logit below the row's largest at which an id has no mass; finite, since 0·∞ is not 0."""


def sample_batch(
    rows: Mapping[str, torch.Tensor],
    head_VD: torch.Tensor,
    keys: Sequence[str],
    counts: Mapping[str, Sequence[int]],
    wants: Wants,
    cap: float | None = None,
) -> dict[str, list[Sampled]]:
    """Per row kind, the samples of every mixture row, on the CPU.

    Args:
        rows: by kind, hidden states ``[R, D]`` of all mixture rows one after the other, ``counts`` of them each, named ``keys``.
        cap: as ``head_logits`` takes it.
    """
    result = {}
    for kind, (sampler, size, seed) in wants.sampled.items():
        draws = size if sampler == "random" else 1
        each = [uniforms(seed, key, kind, count, draws) for key, count in zip(keys, counts[kind])]
        whole = sample_rows(rows[kind], head_VD, sampler, size, torch.cat(each), cap).to("cpu")
        columns = [column.split(list(counts[kind])) for column in vars(whole).values()]
        result[kind] = [Sampled(*one) for one in zip(*columns)]
    return result


def uniforms(seed: int, key: str, kind: str, rows: int, draws: int) -> torch.Tensor:
    """float64 ``[rows, draws]`` in [0, 1), 53 bits each; row r is the same however many rows there are."""
    digest = hashlib.sha256(f"{seed}/{kind}/{key}".encode()).digest()
    # The raw words of a bit generator are the same in every numpy; its Generator's methods need not be.
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(rows * draws)
    return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53).view(rows, draws)


def sample_rows(
    hidden_RD: torch.Tensor,
    head_VD: torch.Tensor,
    sampler: str,
    size: int,
    uniforms_RN: torch.Tensor,
    cap: float | None = None,
) -> Sampled:
    """``Sampled`` of every row on the hidden states' device; NaN rows get a NaN entropy.

    Args:
        size: draws of ``random``, ids of ``threshold``. uniforms_RN: float64, N = ``size`` for ``random``, 1 for ``threshold``.
        cap: as ``head_logits`` takes it.
    """
    columns = size if sampler == "random" else min(size, head_VD.shape[0])
    uniforms_RN = uniforms_RN.to(hidden_RD.device)
    chunks = [
        _random_chunk(head_logits(chunk, head_VD, cap), ticks)
        if sampler == "random"
        else _threshold_chunk(head_logits(chunk, head_VD, cap), ticks, columns)
        for chunk, ticks in _chunks(hidden_RD, uniforms_RN, chunk_rows(head_VD, CHUNK_BYTES))
    ]
    if not chunks:
        empty = hidden_RD.new_zeros((0, columns), dtype=torch.float32)
        return Sampled(empty.to(torch.int64), empty, empty.new_zeros(0))
    return Sampled(*(torch.cat(column) for column in zip(*chunks)))


def _chunks(hidden: torch.Tensor, ticks: torch.Tensor, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(hidden.split(rows), ticks.split(rows))) if len(hidden) else []


def _masses(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(e^(z − max z) float32 ``[R, V]``, its sum and the entropy in nats float64 ``[R]``); overwrites ``logits``."""
    shifted = logits.sub_(logits.amax(dim=1, keepdim=True)).clamp_min_(_LOWEST)
    masses = shifted.exp()
    total = masses.sum(dim=1, dtype=torch.float64)
    entropy = total.log() - shifted.mul_(masses).sum(dim=1, dtype=torch.float64) / total
    return masses, total, entropy


def _random_chunk(logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    masses, _, entropy = _masses(logits)
    cumulated = masses.cumsum(dim=1, dtype=torch.float64)
    drawn = _ids_at(cumulated, uniforms * cumulated[:, -1:]).sort(dim=1).values
    first = torch.ones_like(drawn)
    first[:, 1:] = drawn.diff(dim=1) > 0
    place = first.cumsum(dim=1) - 1
    counts = torch.zeros_like(drawn).scatter_add_(1, place, torch.ones_like(drawn))
    ids = torch.zeros_like(drawn).scatter_(1, place, drawn)
    return ids, counts.to(torch.float32) / drawn.shape[1], entropy.to(torch.float32)


def _threshold_chunk(
    logits: torch.Tensor, uniforms: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest are kept as they are; k − L others at equal distances of cumulated mass, beginning at a uniform place."""
    masses, total, entropy = _masses(logits)
    top, top_ids = masses.topk(k, dim=1)
    exact = _count_exact(top.double(), masses.scatter_(1, top_ids, 0.0).sum(dim=1, dtype=torch.float64))
    places = torch.arange(k, device=logits.device)
    is_exact = places < exact[:, None]
    cumulated = masses.scatter_(1, top_ids, top.masked_fill(is_exact, 0.0)).cumsum(dim=1, dtype=torch.float64)
    left = k - exact
    distance = cumulated[:, -1:] / left[:, None].clamp_min(1)
    others = _ids_at(cumulated, (uniforms + places) * distance)
    ids = torch.where(is_exact, top_ids, others.gather(1, (places - exact[:, None]).clamp_min(0)))
    threshold = (distance / total[:, None]).to(torch.float32)
    weights = (top / total[:, None]).to(torch.float32).maximum(threshold)
    weights = torch.where(is_exact, weights, threshold)
    # Fewer than k ids with any mass: all are exact, τ is 0, and the places that are left over are padding.
    return ids.masked_fill(weights == 0, 0), weights, entropy.to(torch.float32)


def _count_exact(top: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
    """L int64 ``[R]``: ids with p ≥ τ, the smallest L for which the next is below τ = (mass of all others) / (k − L).

    Args:
        top: float64 ``[R, k]`` falling. outside: mass of everything else; sums run from the smallest, nothing cancels.
    """
    rest = top.flip(1).cumsum(dim=1).flip(1) + outside[:, None]
    threshold = rest / torch.arange(top.shape[1], 0, -1, device=top.device)
    return (top > threshold * _SURE).to(torch.int64).cumprod(dim=1).sum(dim=1)


def _ids_at(cumulated: torch.Tensor, ticks: torch.Tensor) -> torch.Tensor:
    """int64: the id into whose share of the cumulated mass ``[R, V]`` each tick ``[R, N]`` falls; never one without mass."""
    total = cumulated[:, -1:]
    inside = ticks.minimum(torch.nextafter(total, torch.zeros_like(total))).contiguous()
    return torch.searchsorted(cumulated, inside, right=True).clamp_max_(cumulated.shape[1] - 1)
