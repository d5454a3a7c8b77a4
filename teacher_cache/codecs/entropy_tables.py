"""Frequency tables of symbols: fitted from samples, with escapes for what lies outside."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import constriction
import numpy as np
import torch

from teacher_cache.errors import CacheError

MOST_TABLE = 1 << 22
"""Entries of a table; those of ids have one for every token of the vocabulary."""
FARTHEST = 1 << 30
"""Measures beyond are no part of a table's window: the symbol of an infinity is one."""
SMOOTHING = 0.05
"""Counts given to every symbol of a table, seen or not."""
MOST_ENTRIES = 1 << 14
"""Of a fitted table for measures; what lies outside is escaped."""


@dataclass(frozen=True)
class Table:
    """Probabilities of the symbols ``low … low + A − 2``; the last entry is the escape.

    Attributes:
        probabilities: float32 ``[A]``, positive.
    """

    low: int
    probabilities: torch.Tensor

    def __post_init__(self) -> None:
        """CacheError for one that no calibration makes; the library takes even negative probabilities."""
        each = self.probabilities
        fits = each.dtype == torch.float32 and each.ndim == 1 and 2 <= len(each) <= MOST_TABLE
        if not fits or not bool(((each > 0) & (each <= 1)).all()) or not -(1 << 31) <= self.low < (1 << 31) - len(each):
            raise CacheError("a calibration holds an invalid table: it is damaged, or of another kind of field")

    @cached_property
    def model(self) -> Any:
        return constriction.stream.model.Categorical(self.probabilities.numpy(), perfect=False)

    @cached_property
    def escape(self) -> int:
        return len(self.probabilities) - 1

    def __getstate__(self) -> dict[str, Any]:
        return {"low": self.low, "probabilities": self.probabilities}  # the library's model does not pickle

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def bits(self, symbols: np.ndarray) -> float:
        """Ideal cost of ``symbols`` under this table, escapes at 32 bits more."""
        places = self.places(symbols)
        probabilities = self.probabilities.double() / self.probabilities.double().sum()
        bits = -torch.log2(probabilities)[torch.from_numpy(places.astype(np.int64))].sum()
        return float(bits) + 32.0 * int((places == self.escape).sum())

    def places(self, symbols: np.ndarray) -> np.ndarray:
        """int32 index of every symbol in the table; the escape's where it has none."""
        places = symbols.astype(np.int64) - self.low
        return np.where((places < 0) | (places >= self.escape), self.escape, places).astype(np.int32)


def fit_table(symbols: np.ndarray, low: int, high: int, prior: np.ndarray | None = None) -> Table:
    """A table for ``low … high`` from symbols seen in calibration.

    Args:
        prior: ``[high − low + 1]`` pseudo-counts besides the seen ones; None: ``SMOOTHING`` each.
    """
    inside = symbols[(symbols >= low) & (symbols <= high)].astype(np.int64)
    counts = np.bincount(inside - low, minlength=high - low + 1).astype(np.float64)
    counts += SMOOTHING if prior is None else prior
    escapes = len(symbols) - len(inside) + SMOOTHING
    every = np.append(counts, escapes)
    # The coder works with 24-bit probabilities: anything rarer is given what it can express.
    every = np.maximum(every / every.sum(), 2.0**-22)
    return Table(low, torch.from_numpy((every / every.sum()).astype(np.float32)))


def fit_smooth_table(symbols: np.ndarray) -> Table:
    """A table for a quantised measure, whose neighbouring symbols are about as likely: what was seen, blurred, and a margin around it.

    The blur is a tenth of the spread, so that a few hundred symbols fit a table of thousands.
    """
    inside = symbols[np.abs(symbols.astype(np.int64)) < FARTHEST].astype(np.int64)
    if not len(inside):
        return fit_table(symbols, -8, 8)
    # Around the median, wherever it lies: some teachers' mean logit is -100.
    middle, reach = int(np.sort(inside)[len(inside) // 2]), MOST_ENTRIES // 2
    inside = inside[np.abs(inside - middle) < reach]
    margin = max(8, int(np.ptp(inside)) // 8)
    low, high = max(int(inside.min()) - margin, middle - reach), min(int(inside.max()) + margin, middle + reach)
    counts = np.bincount(inside - low, minlength=high - low + 1).astype(np.float64)
    quarter, three = np.percentile(inside, [25, 75])
    width = max(1.0, 0.1 * (three - quarter))
    wide = np.arange(-int(3 * width) - 1, int(3 * width) + 2)
    kernel = np.exp(-0.5 * (wide / width) ** 2)
    blurred = np.convolve(counts, kernel / kernel.sum(), mode="same") if len(counts) > len(kernel) else counts
    return fit_table(symbols, low, high, blurred + 0.02)
