"""Numbers that compare two targets: angles of gradients, norms, divergences between distributions. Knows no cache and no model.

Shapes: R rows, C rows of a chunk, V vocabulary, D width of the student.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from student_train.distributions import Distribution, FullVocabulary, HeadAndTail, is_full
from student_train.losses.divergences import forward_kl, reverse_kl
from teacher_cache.teachers.head import CHUNK_BYTES, chunk_rows

NO_GRADIENT = 1e-20
"""Norm below which a row has no direction: it is left out where both sides have none."""
DIRECTIONS = {"forward": forward_kl, "reverse": reverse_kl}


def angles(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Degrees between rows ``[R, W]``; 90 where one side is zero, NaN where both are. Exact for tiny angles, which acos is not."""
    norms = torch.stack([reference.norm(dim=1), other.norm(dim=1)])
    unit, other_unit = (one / norm.clamp_min(NO_GRADIENT)[:, None] for one, norm in zip((reference, other), norms))
    degrees = torch.rad2deg(2 * torch.atan2((unit - other_unit).norm(dim=1), (unit + other_unit).norm(dim=1)))
    return degrees.masked_fill((norms <= NO_GRADIENT).all(dim=0), torch.nan)


def norm_ratios(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """‖other‖ / ‖reference‖ of rows ``[R, W]``; NaN where the reference is zero."""
    norm = reference.norm(dim=1)
    return (other.norm(dim=1) / norm).masked_fill(norm <= NO_GRADIENT, torch.nan)


def whole_angle(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> tuple[float, float]:
    """(degrees, norm ratio) of two gradients that are lists of tensors, summed in float64."""

    def square(tensors: Iterable[torch.Tensor]) -> float:
        return sum(float(one.double().square().sum()) for one in tensors)

    norm, other_norm = math.sqrt(square(reference)), math.sqrt(square(other))
    if norm <= NO_GRADIENT:
        return math.nan, math.nan
    if other_norm <= NO_GRADIENT:
        return 90.0, 0.0
    pairs = list(zip(reference, other, strict=True))
    apart = math.sqrt(square(b.double() / other_norm - a.double() / norm for a, b in pairs))
    together = math.sqrt(square(b.double() / other_norm + a.double() / norm for a, b in pairs))
    return math.degrees(2 * math.atan2(apart, together)), other_norm / norm


def spread(values: Sequence[torch.Tensor]) -> dict[str, float]:
    """``{"median", "p95"}`` over all finite rows; NaN where there are none."""
    joined = torch.cat(list(values)).float().cpu() if values else torch.zeros(0)
    kept = joined[torch.isfinite(joined)]
    if not len(kept):
        return {"median": math.nan, "p95": math.nan}
    # numpy: torch.quantile stops at 2^24 rows
    import numpy as np

    return {"median": float(np.median(kept.numpy())), "p95": float(np.percentile(kept.numpy(), 95))}


def relative_error(value: float, reference: float) -> float:
    """(value − reference) / |reference|; 0 where both are 0."""
    if reference == 0:
        return 0.0 if value == 0 else math.inf
    return (value - reference) / abs(reference)


@dataclass
class RowTally:
    """Rows seen so far: values of a loss, and their gradients against the reference's."""

    total: float = 0.0
    count: int = 0
    degrees: list[torch.Tensor] = field(default_factory=list)
    ratios: list[torch.Tensor] = field(default_factory=list)

    def add(self, values: torch.Tensor, reference: torch.Tensor, gradient: torch.Tensor) -> None:
        """values ``[C]`` (or one of a whole sample), gradients ``[C, W]``."""
        self.total += float(values.double().sum())
        self.count += values.numel()
        self.degrees.append(angles(reference, gradient).cpu())
        self.ratios.append(norm_ratios(reference, gradient).cpu())

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    def summary(self) -> dict[str, Any]:
        return {"loss": self.mean, "row_angle": spread(self.degrees), "row_norm_ratio": spread(self.ratios)}


def full_log_probs(distribution: Distribution) -> torch.Tensor | None:
    """float32 ``[R, V]`` of any distribution: a tail bucket is spread evenly over its tokens. None: it cannot be completed."""
    if is_full(distribution):
        return cast(FullVocabulary, distribution).log_probs()
    if not isinstance(distribution, HeadAndTail):
        return None
    topk, vocabulary = distribution.topk, distribution.vocabulary
    others = max(1, vocabulary - topk.ids.shape[1])
    even = (topk.log_tail - math.log(others))[:, None].expand(-1, vocabulary)
    return even.scatter(1, topk.ids, topk.log_probs)


def divergence(live: FullVocabulary, cached: Distribution) -> torch.Tensor | None:
    """KL(p ‖ p̂) ``[R]`` in nats, never below 0 but by rounding; None where p̂ does not say every token's probability."""
    estimate = full_log_probs(cached)
    if estimate is None:
        return None
    log_p = live.log_probs()
    return torch.linalg.vecdot(log_p.exp(), torch.where(log_p > -torch.inf, log_p - estimate, 0.0))


def entropy(live: FullVocabulary) -> torch.Tensor:
    """−Σ p log p ``[R]`` in nats."""
    log_p = live.log_probs()
    return -torch.linalg.vecdot(log_p.exp(), log_p.clamp_min(-1e4))


def row_chunks(rows: int, head: torch.Tensor) -> Iterator[slice]:
    """Slices whose logits fit a chunk. head ``[V, D]``."""
    step = chunk_rows(head, CHUNK_BYTES)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def distribution_error(
    live: FullVocabulary,
    cached: Distribution,
    student_logits: torch.Tensor,
    student_hidden: torch.Tensor | None = None,
    directions: Sequence[str] = ("forward", "reverse"),
) -> dict[str, Any]:
    """How far a stored distribution is from the live one, alone and in the gradients that it gives.

    Args:
        student_logits: ``[R, V]``. student_hidden: ``[R, D]`` that they were made of, for ``head_angle``: between the gradients of the
            student's head, Σ_rows (∂/∂logits)ᵀ·hidden.
    Returns:
        ``{"rows", "entropy", "kl": {"mean", "p95"}, "forward": {"loss_live", "loss", "loss_error", "row_angle": {"median", "p95"},
        "row_norm_ratio": …, "head_angle"}, "reverse": …}``; a direction that the stored distribution cannot serve is left out.
    """
    tally = DistributionTally(directions)
    for rows in row_chunks(len(student_logits), student_logits.T):
        hidden = None if student_hidden is None else student_hidden[rows]
        tally.add(live[rows], cached[rows], student_logits[rows], hidden)
    return tally.summary()


class DistributionTally:
    """``distribution_error`` chunk by chunk, for rows that never exist together."""

    def __init__(self, directions: Sequence[str] = ("forward", "reverse")):
        self.live = {name: RowTally() for name in directions}
        self.cached = {name: RowTally() for name in directions}
        self.head: dict[str, list[torch.Tensor]] = {}
        self.kl: list[torch.Tensor] = []
        self.entropy: list[torch.Tensor] = []

    def add(
        self, live: FullVocabulary, cached: Distribution, logits: torch.Tensor, hidden: torch.Tensor | None = None
    ) -> None:
        """One chunk: logits ``[C, V]``, hidden ``[C, D]``."""
        self.entropy.append(entropy(live).cpu())
        apart = divergence(live, cached)
        if apart is not None:
            self.kl.append(apart.cpu())
        for name in list(self.live):
            values, gradient = value_and_gradient(name, live, logits)
            try:
                cached_values, cached_gradient = value_and_gradient(name, cached, logits)
            except TypeError:  # samples of a distribution say nothing in reverse
                del self.live[name], self.cached[name]
                continue
            self.live[name].add(values, gradient, gradient)
            self.cached[name].add(cached_values, gradient, cached_gradient)
            if hidden is not None:
                parts = [gradient.T @ hidden, cached_gradient.T @ hidden]
                before = self.head.get(name)
                self.head[name] = parts if before is None else [a + b for a, b in zip(before, parts)]

    def summary(self) -> dict[str, Any]:
        kl = torch.cat(self.kl) if self.kl else torch.zeros(0)
        found: dict[str, Any] = {
            "rows": sum(map(len, self.entropy)),
            "entropy": float(torch.cat(self.entropy).mean()) if self.entropy else math.nan,
            "kl": {"mean": float(kl.mean()), "p95": spread([kl])["p95"]} if len(kl) else None,
        }
        for name, live in self.live.items():
            one = self.cached[name].summary()
            one |= {"loss_live": live.mean, "loss_error": relative_error(one["loss"], live.mean)}
            if name in self.head:
                one["head_angle"], one["head_norm_ratio"] = whole_angle(*([part] for part in self.head[name]))
            found[name] = one
        return found


def value_and_gradient(
    direction: str, teacher: Distribution, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values ``[C]`` and ∂/∂logits ``[C, V]`` of the forward or reverse KL."""
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        values = DIRECTIONS[direction](teacher, leaf)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient
