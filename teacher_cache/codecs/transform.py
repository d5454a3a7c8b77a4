"""Transform coder: rows ``[R, D]`` → a few small integers each, by a KLT in a given metric and one uniform quantiser step.

The step is the same for every dimension, which is reverse water-filling: dimensions with less energy than the step quantise to zero
and cost nearly nothing. Fitted once on calibration rows, then fixed: basis, ranks and entropy tables lie beside the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from teacher_cache.codecs.entropy import Decoder, Stream, Table, fit_table
from teacher_cache.errors import KdcliError

VERSION = 1
LARGEST = 127
CLASSES_PER_OCTAVE = 4
"""Dimensions share a table with those of about their own scale: fine enough to cost little, coarse enough to be fitted."""
LEAST_USED = 1e-3
"""A dimension whose symbol is zero in all but this share of the calibration rows is left out. Judged by use, not by variance: the
coefficients have heavy tails, and leaving out what has little variance tripled the KL of a sketch without its head."""


@dataclass(frozen=True)
class Transform:
    """A fitted coder.

    Attributes:
        mean: float32 ``[D]``. encode: float32 ``[D, r]``: y = (h − mean)·encode. step: of the quantiser, in units of y.
        classes: uint8 ``[r]``: the table of each dimension. tables: float32 ``[C, 256]``: symbols −127 … 127 and the escape.
        shrink: float32 ``[C]``: how far, in steps, values of a bin lie below its middle on average.
    """

    mean: torch.Tensor
    encode: torch.Tensor
    step: float
    classes: torch.Tensor
    tables: torch.Tensor
    shrink: torch.Tensor

    @property
    def rank(self) -> int:
        return self.encode.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """For a calibration file."""
        step = torch.tensor([self.step], dtype=torch.float32)
        return {**{name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}, "step": step}

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> Transform:
        names = ("mean", "encode", "classes", "tables", "shrink")
        return cls(step=float(tensors["step"]), **{name: tensors[name] for name in names})

    @cached_property
    def _by_class(self) -> list[tuple[int, np.ndarray, Table]]:
        classes = self.classes.numpy()
        return [
            (number, np.flatnonzero(classes == number), Table(-LARGEST, self.tables[number]))
            for number in range(len(self.tables))
        ]

    def quantise(self, rows: torch.Tensor) -> np.ndarray:
        """int32 ``[R, r]`` of rows ``[R, D]``."""
        values = (rows.to(torch.float32) - self.mean) @ self.encode
        return values.div_(self.step).round_().to(torch.int32).numpy()

    def streams(self, symbols: np.ndarray) -> list[Stream]:
        """One stream a table: what ``entropy.encode`` wants."""
        return [(symbols[:, dims], table) for _, dims, table in self._by_class]

    def read(self, decoder: Decoder) -> torch.Tensor:
        """float32 ``[R, r]``: y as the reader sees it, bins at their mean value."""
        values = np.empty((decoder.rows, self.rank), dtype=np.float32)
        for number, dims, table in self._by_class:
            symbols = decoder.take(decoder.rows * len(dims), table).reshape(decoder.rows, len(dims))
            inward = np.sign(symbols) * np.float32(self.shrink[number])
            values[:, dims] = (symbols - inward) * np.float32(self.step)
        return torch.from_numpy(values)


def fit(rows: torch.Tensor, root: torch.Tensor | None, step: float, centre: bool = True) -> Transform:
    """Fit on calibration rows.

    Args:
        rows: ``[R, D]``. root: S ``[D, D]``, square root of the metric; None: Euclidean.
        centre: subtract the mean first (False where inner products matter, which a mean would mix).
    Raises:
        KdcliError: fewer rows than twice their width, where a covariance means nothing.
    """
    count, width = rows.shape
    if count < 2 * width:
        raise KdcliError(f"calibration saw {count} rows of width {width}: at least {2 * width} are needed")
    wide = rows.double()
    mean = wide.mean(dim=0) if centre else wide.new_zeros(width)
    centred = wide - mean if root is None else (wide - mean) @ root.double()
    variance, basis = torch.linalg.eigh(centred.T @ centred / count)
    variance, basis = variance.flip(0).clamp_min(0), basis.flip(1)
    coefficients = (centred @ (basis / step)).numpy()
    used = np.flatnonzero((np.abs(coefficients) > 0.5).mean(axis=0) > LEAST_USED)
    rank = int(used.max()) + 1 if len(used) else 1
    coefficients = coefficients[:, :rank]
    encode = basis[:, :rank] if root is None else root.double() @ basis[:, :rank]
    classes = scale_classes(variance[:rank].sqrt().numpy() / step)
    tables, shrink = zip(*(_fit_class(coefficients[:, classes == c]) for c in range(classes.max() + 1)))
    return Transform(
        mean.float(),
        encode.float().contiguous(),
        step,
        torch.from_numpy(classes.astype(np.uint8)),
        torch.stack([table.probabilities for table in tables]),
        torch.tensor(shrink, dtype=torch.float32),
    )


def scale_classes(scales: np.ndarray) -> np.ndarray:
    """Class numbers 0 … of dimensions by scale, without gaps."""
    octaves = np.floor(np.log2(np.maximum(scales, 1e-6)) * CLASSES_PER_OCTAVE).astype(np.int64)
    return np.unique(-octaves, return_inverse=True)[1]


def _fit_class(values: np.ndarray) -> tuple[Table, float]:
    """Table and bin shift of one class from its values ``[R, dims]`` in steps; a Laplace distribution fills what was not seen."""
    symbols = np.rint(values).astype(np.int64).reshape(-1)
    flat = values.reshape(-1)
    scale = max(float(np.abs(flat).mean()), 1e-3)
    prior = np.exp(-np.abs(np.arange(-LARGEST, LARGEST + 1)) / scale)
    table = fit_table(symbols, -LARGEST, LARGEST, prior / prior.sum() * 8 + 1e-4)
    nonzero = symbols != 0
    inward = float((np.abs(symbols) - np.abs(flat))[nonzero].mean()) if nonzero.any() else 0.0
    return table, min(max(inward, 0.0), 0.4)


def head_metric(head: torch.Tensor, mean_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(S, S⁻¹) float64 ``[D, D]``: ‖S·δh‖² is the variance over the vocabulary of the logit error that δh causes.

    The variance is weighted with w = ½·p̄ + ½·1/V: half where the teacher's mass is, half everywhere.

    Args:
        head: W ``[V, D]``. mean_probs: p̄ ``[V]``, the teacher's mean distribution on the calibration rows.
    """
    weights = 0.5 * mean_probs.double() + 0.5 / len(head)
    metric = head.new_zeros((head.shape[1],) * 2, dtype=torch.float64)
    mean = head.new_zeros(head.shape[1], dtype=torch.float64)
    for rows, share in zip(head.split(16384), weights.split(16384)):
        wide = rows.double()
        metric += (wide * share[:, None]).T @ wide
        mean += share @ wide
    metric -= torch.outer(mean, mean)  # Σw = 1
    values, vectors = torch.linalg.eigh(metric)
    roots = values.clamp_min(values.max() * 1e-10).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
