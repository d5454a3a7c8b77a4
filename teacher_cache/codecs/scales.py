"""Quantisers of single numbers: real values ↔ small integers.

``LogScale`` is for x = −log p ≥ 0: the step grows with x (relative precision where p is large, coarser where it is tiny), from ``step``
at x = 0 to twice that at x = 4, four times at x = 12. ``LogOdds`` is the same to both sides, for log(p / (1 − p)), so that neither a tail
of 1e-6 nor a head of 1e-6 is lost. ``Uniform`` is for raw-logit measures, whose error counts the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from teacher_cache.errors import KdcliError

BEND = 4.0
KNOWN = 1 << 12
"""Symbols whose values are kept."""
INFINITE = (1 << 31) - 1
"""Symbol of x = ∞ (an empty tail): outside of every table, so it is escaped."""


@dataclass(frozen=True)
class Uniform:
    """round(x / step)."""

    step: float

    def quantise(self, values: torch.Tensor) -> torch.Tensor:
        """int64 of finite float values; error at most step / 2."""
        wide = values.double()
        if not torch.isfinite(wide).all():
            raise KdcliError("NaN or infinity cannot be coded")
        return (wide / self.step).round().to(torch.int64)

    def restore(self, symbols: torch.Tensor) -> torch.Tensor:
        """float32."""
        return (symbols.double() * self.step).to(torch.float32)


@dataclass(frozen=True)
class LogScale:
    """round(BEND·ln(1 + x / BEND) / step) for x ≥ 0; error at most (step / 2)·(1 + x / BEND), to first order."""

    step: float

    def quantise(self, values: torch.Tensor) -> torch.Tensor:
        """int64; ∞ has a symbol of its own, and what rounding left a little below 0 counts as 0."""
        return _bend(values.clamp_min(0), self.step)

    def restore(self, symbols: torch.Tensor) -> torch.Tensor:
        """float32; negative symbols (damage) give NaN, which no loss lets pass."""
        if _all_known(symbols):
            return known_levels(self.step)[symbols]
        return _straighten(torch.where(symbols < 0, torch.nan, symbols.double()), self.step)


@dataclass(frozen=True)
class LogOdds:
    """``LogScale`` of |u| with u's sign, for u = log p − log(1 − p) of either sign; ±∞ have symbols of their own."""

    step: float

    def quantise(self, values: torch.Tensor) -> torch.Tensor:
        """int64."""
        return torch.where(values < 0, -1, 1) * _bend(values.abs(), self.step)

    def restore(self, symbols: torch.Tensor) -> torch.Tensor:
        """float32."""
        size = symbols.abs()
        known = _all_known(size)
        straight = known_levels(self.step)[size] if known else _straighten(size.double(), self.step)
        return torch.where(symbols < 0, -1.0, 1.0) * straight


def _bend(values: torch.Tensor, step: float) -> torch.Tensor:
    """int64 of x ≥ 0."""
    if torch.isnan(values).any():
        raise KdcliError("NaN cannot be coded")
    bent = (BEND / step * torch.log1p(values.double() / BEND)).round()
    return torch.where(torch.isinf(values), INFINITE, bent.clamp_max(INFINITE - 1).to(torch.int64))


def _straighten(symbols: torch.Tensor, step: float) -> torch.Tensor:
    """float32 x ≥ 0 of float64 symbols."""
    straight = BEND * torch.expm1(symbols * (step / BEND))
    return torch.where(symbols == INFINITE, torch.inf, straight).to(torch.float32)


@lru_cache(maxsize=16)
def known_levels(step: float) -> torch.Tensor:
    """float32 ``[KNOWN]``: what the first symbols stand for, looked up instead of worked out again for every record."""
    return _straighten(torch.arange(KNOWN, dtype=torch.float64), step)


def _all_known(symbols: torch.Tensor) -> bool:
    if not symbols.numel() or symbols.dtype != torch.int64:
        return False
    low, high = symbols.aminmax()
    return int(low) >= 0 and int(high) < KNOWN
