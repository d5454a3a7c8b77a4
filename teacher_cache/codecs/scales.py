"""Quantisers of single numbers: real values ↔ small integers.

``LogScale`` is for x = −log p ≥ 0: the step grows with x (relative precision where p is large, coarser where it is tiny), from ``step``
at x = 0 to twice that at x = 4, four times at x = 12. ``LogOdds`` is the same to both sides, for log(p / (1 − p)), so that neither a tail
of 1e-6 nor a head of 1e-6 is lost. ``Uniform`` is for raw-logit measures, whose error counts the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from teacher_cache.errors import KdcliError

BEND = 4.0
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
        return torch.where(symbols < 0, -1.0, 1.0) * _straighten(symbols.abs().double(), self.step)


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
