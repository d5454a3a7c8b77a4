"""Probabilities (0 … 1) as one byte each, on a logarithmic scale: equal *relative* error for large and for small ones.

Symbol 0 is nothing at all; symbol s ≥ 1 is e^(−step·(s − 1)). Half a step either way: relative error at most e^(step/2) − 1, and what is
below the last symbol's reach, e^(−step·254.5), becomes 0.
"""

from __future__ import annotations

import math

import torch

from teacher_cache.errors import KdcliError

SYMBOLS = 255
"""Besides 0."""


def quantise(probabilities: torch.Tensor, step: float) -> torch.Tensor:
    """uint8 symbols, any shape; KdcliError where a value is NaN or no probability (rounding may carry one a little above 1)."""
    wide = probabilities.to(torch.float32)
    if not bool(((wide >= 0) & (wide <= 1.001)).all()):
        wrong = wide[~((wide >= 0) & (wide <= 1.001))].reshape(-1)[0]
        raise KdcliError(f"probability {float(wrong):g} is not in [0, 1]")
    steps = (wide.clamp_max(1.0).log() / -step).round()  # log 0 = -inf: beyond every symbol
    return torch.where(steps < SYMBOLS, steps + 1, 0.0).to(torch.uint8)


def dequantise(symbols: torch.Tensor, step: float) -> torch.Tensor:
    """float32 of ``quantise``."""
    return levels(step).to(symbols.device)[symbols.to(torch.int64)]


def levels(step: float) -> torch.Tensor:
    """float32 ``[256]``: the value of each symbol."""
    values = torch.exp(-step * (torch.arange(SYMBOLS + 1, dtype=torch.float64) - 1))
    values[0] = 0.0
    return values.to(torch.float32)


def floor(step: float) -> float:
    """What is smaller than this becomes 0."""
    return math.exp(-step * (SYMBOLS - 0.5))
