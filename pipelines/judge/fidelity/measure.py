"""Numbers that compare two targets: angles of gradients, norms, divergences between distributions. Knows no cache and no model.

Shapes: R rows, C rows of a chunk, V vocabulary, D width of the student.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from student_train.distributions import Distribution, FullVocabulary, HeadAndTail, is_full
from student_train.losses.divergences import forward_kl, reverse_kl
from teacher_cache.models.head import CHUNK_BYTES, WIDE_VOCABULARY, chunk_rows

NO_GRADIENT = 1e-20
"""Norm below which a row has no direction: it is left out where both sides have none."""
WIDE_CHUNK_BYTES = 32 << 20
"""float32 logits of a chunk on a CPU, of a wide vocabulary."""
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

    norm, other_norm = (math.sqrt(sum(map(squares, side))) for side in (reference, other))
    if norm <= NO_GRADIENT:
        return math.nan, math.nan
    if other_norm <= NO_GRADIENT:
        return 90.0, 0.0
    apart = together = 0.0
    for a, b in ((a, b) for pair in zip(reference, other, strict=True) for a, b in zip(*map(pieces, pair))):
        left, right = a.double() / norm, b.double() / other_norm
        apart += float((right - left).square().sum())
        together += float((right + left).square().sum())
    return math.degrees(2 * math.atan2(math.sqrt(apart), math.sqrt(together))), other_norm / norm


def squares(one: torch.Tensor) -> float:
    """Σ x², in float64."""
    return sum(float(piece.double().square().sum()) for piece in pieces(one))


def pieces(one: torch.Tensor) -> Sequence[torch.Tensor]:
    """Of a large tensor, so that it never stands there in float64 as a whole."""
    return one.reshape(-1).split(1 << 22)


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


def divergence(live: Known, estimate: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ p̂) ``[R]`` in nats, never below 0 but by rounding; estimate: log p̂ ``[R, V]``."""
    log_p = live.log_probs()
    return torch.linalg.vecdot(log_p.exp(), torch.where(log_p > -torch.inf, log_p - estimate, 0.0))


def entropy(live: Known) -> torch.Tensor:
    """−Σ p log p ``[R]`` in nats."""
    log_p = live.log_probs()
    return -torch.linalg.vecdot(log_p.exp(), log_p.clamp_min(-1e4))


def row_chunks(rows: int, head: torch.Tensor) -> Iterator[slice]:
    """Slices whose logits fit a chunk; a comparison has about ten such tensors at once. head ``[V, D]``."""
    wide = len(head) >= WIDE_VOCABULARY and not head.is_cuda
    step = max(1, WIDE_CHUNK_BYTES // (4 * len(head))) if wide else chunk_rows(head, CHUNK_BYTES)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True)
class Known:
    """A distribution of full vocabulary whose log-probs ``[C, V]`` are made already, at temperature 1."""

    values: torch.Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Any) -> Known:
        return Known(self.values[rows])

    def log_probs(self, temperature: float = 1.0) -> torch.Tensor:
        return self.values


class Comparison:
    """Stored distributions against the live one, chunk by chunk, for rows that never exist together; what is live is made once for all.

    Args:
        names: of the stored ones. directions: of the divergence whose gradients are compared.
    """

    def __init__(self, names: Iterable[str], directions: Sequence[str] = tuple(DIRECTIONS)):
        self.directions = tuple(directions)
        self.stored = {name: DistributionTally(directions) for name in names}
        self.entropy: list[torch.Tensor] = []
        self.live = {name: RowTally() for name in directions}
        self.live_head: dict[str, torch.Tensor] = {}

    def add(
        self,
        live: FullVocabulary,
        stored: Mapping[str, Distribution],
        logits: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
    ) -> None:
        """One chunk.

        Args:
            logits: the student's ``[C, V]``, None without directions. hidden: ``[C, D]`` that they were made of, for its head's gradient.
        """
        known = Known(live.log_probs())
        self.entropy.append(entropy(known).cpu())
        gradients = {}
        for name in self.directions:
            assert logits is not None
            values, gradients[name] = value_and_gradient(name, known, logits)
            self.live[name].add(values, gradients[name], gradients[name])
            if hidden is not None:
                add_product(self.live_head, name, gradients[name], hidden)
        for name, one in stored.items():
            self.stored[name].add(known, gradients, one, logits, hidden)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Name → how far a stored distribution is from the live one, alone and in the gradients that it gives.

        Each is ``{"rows", "entropy", "kl": {"mean", "p95"}, "forward": {"loss_live", "loss", "loss_error", "row_angle": {"median", "p95"},
        "row_norm_ratio": …, "head_angle"}, "reverse": …}``; a direction that the stored distribution cannot serve is left out.
        ``head_angle`` is between the gradients of the student's head, Σ_rows (∂/∂logits)ᵀ·hidden.
        """
        about = {
            "rows": sum(map(len, self.entropy)),
            "entropy": float(torch.cat(self.entropy).mean()) if self.entropy else math.nan,
        }
        return {name: {**about, **one.summary(self.live, self.live_head)} for name, one in self.stored.items()}


class DistributionTally:
    """One stored distribution of a ``Comparison``."""

    def __init__(self, directions: Sequence[str]):
        self.rows = {name: RowTally() for name in directions}
        self.head: dict[str, torch.Tensor] = {}
        self.kl: list[torch.Tensor] = []

    def add(
        self,
        live: Known,
        gradients: Mapping[str, torch.Tensor],
        stored: Distribution,
        logits: torch.Tensor | None,
        hidden: torch.Tensor | None,
    ) -> None:
        estimate = full_log_probs(stored)
        if estimate is not None:
            self.kl.append(divergence(live, estimate).cpu())
        known = Known(estimate) if estimate is not None and is_full(stored) else stored
        for name in list(self.rows):
            assert logits is not None
            try:
                values, gradient = value_and_gradient(name, known, logits)
            except TypeError:  # samples of a distribution say nothing in reverse
                del self.rows[name]
                continue
            self.rows[name].add(values, gradients[name], gradient)
            if hidden is not None:
                add_product(self.head, name, gradient, hidden)

    def summary(self, live: Mapping[str, RowTally], live_head: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        kl = torch.cat(self.kl) if self.kl else torch.zeros(0)
        found: dict[str, Any] = {"kl": {"mean": float(kl.mean()), "p95": spread([kl])["p95"]} if len(kl) else None}
        for name, tally in self.rows.items():
            one = tally.summary()
            one |= {"loss_live": live[name].mean, "loss_error": relative_error(one["loss"], live[name].mean)}
            if name in self.head:
                one["head_angle"], one["head_norm_ratio"] = whole_angle([live_head[name]], [self.head[name]])
            found[name] = one
        return found


def add_product(into: dict[str, torch.Tensor], name: str, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """Add gradientᵀ·hidden ``[V, D]``."""
    if name in into:
        into[name].addmm_(gradient.T, hidden)
    else:
        into[name] = gradient.T @ hidden


def value_and_gradient(
    direction: str, teacher: Distribution, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values ``[C]`` and ∂/∂logits ``[C, V]`` of the forward or reverse KL."""
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        values = DIRECTIONS[direction](teacher, leaf)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient
