"""Quantisers of single numbers: real values ↔ small integers.

``LogScale`` is for x = −log p ≥ 0: the step grows with x (relative precision where p is large, coarser where it is tiny), from ``step``
at x = 0 to twice that at x = 4, four times at x = 12. ``Uniform`` is for raw-logit measures, whose error counts the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BEND = 4.0
INFINITE = (1 << 31) - 1
"""Symbol of x = ∞ (an empty tail): outside of every table, so it is escaped."""


@dataclass(frozen=True)
class Uniform:
    """round(x / step)."""

    step: float

    def quantise(self, values: torch.Tensor) -> torch.Tensor:
        """int64 of finite float values; error at most step / 2."""
        return (values.double() / self.step).round().to(torch.int64)

    def restore(self, symbols: torch.Tensor) -> torch.Tensor:
        """float32."""
        return (symbols.double() * self.step).to(torch.float32)


@dataclass(frozen=True)
class LogScale:
    """round(BEND·ln(1 + x / BEND) / step) for x ≥ 0; error at most (step / 2)·(1 + x / BEND), to first order."""

    step: float

    def quantise(self, values: torch.Tensor) -> torch.Tensor:
        """int64; ∞ has a symbol of its own."""
        bent = (BEND / self.step * torch.log1p(values.double().clamp_min(0) / BEND)).round()
        return torch.where(torch.isinf(values), INFINITE, bent.clamp_max(INFINITE - 1).to(torch.int64))

    def restore(self, symbols: torch.Tensor) -> torch.Tensor:
        """float32; negative symbols (damage) give NaN, which no loss lets pass."""
        straight = BEND * torch.expm1(symbols.double() * (self.step / BEND))
        return torch.where(symbols == INFINITE, torch.inf, straight).to(torch.float32)
