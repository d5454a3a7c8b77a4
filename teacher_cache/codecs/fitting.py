"""Fits a transform coder on calibration rows: the basis in a given metric, classes of scale, a table for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from teacher_cache.codecs import spectrum
from teacher_cache.codecs.entropy_tables import Table, fit_table
from teacher_cache.codecs.spectrum import Grid
from teacher_cache.codecs.transform import Transform
from teacher_cache.errors import KdcliError

LARGEST = 2047
CLASSES_PER_OCTAVE = 4
"""Dimensions share a table with those of about their own scale: fine enough to cost little, coarse enough to be fitted."""
LEAST_ROWS = 128
DIMENSIONS_A_ROW = 2
"""Rows that a fit wants: one for so many dimensions, and ``LEAST_ROWS`` whatever the width."""
MANY_ROWS = 8
"""Rows a dimension from which on rows look like others along their own axes."""
FOLDS = 4
LEAST_USED = 1e-3
"""A dimension whose symbol is zero in all but this share of the calibration rows is left out. Judged by use, not by variance: the
coefficients have heavy tails, and leaving out what has little variance tripled the KL of a sketch without its head."""


@dataclass(frozen=True)
class Basis:
    """Axes of calibration rows in a metric, whatever step they will be coded with.

    Attributes:
        mean: float64 ``[D]``. encode: float64 ``[D, D]``: y = (h − mean)·encode, dimensions of falling energy.
        coefficients: float32 ``[R, D]``: y of the rows, over their grids, as axes show it that were fitted without them.
        bands: uint8 ``[R]``, see ``spectrum.bands``.
    """

    mean: torch.Tensor
    encode: torch.Tensor
    coefficients: np.ndarray
    bands: np.ndarray


def fit(
    rows: torch.Tensor, root: torch.Tensor | None, step: float, centre: bool = True, grids: Sequence[Grid] = ()
) -> Transform:
    """``at_step`` of ``fit_basis``: the coder of one step."""
    return at_step(fit_basis(rows, root, centre, grids), step)


def fit_basis(rows: torch.Tensor, root: torch.Tensor | None, centre: bool = True, grids: Sequence[Grid] = ()) -> Basis:
    """Fit on calibration rows, on their device; the result is on the CPU.

    Any basis of the metric keeps what a step promises: a worse one costs bytes. What too few rows would get wrong is how large unseen
    rows are along axes that were fitted to others. So below ``MANY_ROWS`` · D rows, each of ``FOLDS`` folds is looked at along axes of
    the other folds, and the tables and the rank come from that.

    Args:
        rows: ``[R, D]``. root: S ``[D, D]``, square root of the metric; None: Euclidean.
        centre: subtract the mean first (False where inner products matter, which a mean would mix).
        grids: of all samples, among ``rows``.
    Raises:
        KdcliError: fewer rows than ``least_rows``.
    """
    count, width = rows.shape
    if count < (least := least_rows(width)):
        raise KdcliError(f"calibration saw {count} rows of width {width}: at least {least} are needed")
    wide = rows.double()
    if not torch.isfinite(wide).all():
        raise KdcliError("calibration rows hold NaN or infinity")
    mean = wide.mean(dim=0) if centre else wide.new_zeros(width)
    wide = wide - mean if root is None else (wide - mean) @ root.double()
    whole = Moments.of(wide)
    if count < MANY_ROWS * width:
        seen = wide.new_empty(count, width, dtype=torch.float32)
        for part in folds(count, grids):
            part = part.to(wide.device)
            others = whole - Moments.of(wide[part])
            seen[part] = ((wide[part] - others.mean(centre)) @ others.axes(centre)).float()
    axes = whole.axes(centre)
    if count >= MANY_ROWS * width:
        seen = (wide @ axes).float()
    coefficients = spectrum.forward(seen.cpu(), grids).numpy()
    encode = axes if root is None else root.double() @ axes
    return Basis(mean.cpu(), encode.cpu(), coefficients, spectrum.bands(count, grids))


def least_rows(width: int) -> int:
    """Calibration rows below which tables would be guesses."""
    return min(2 * width, max(LEAST_ROWS, width // DIMENSIONS_A_ROW))


class Moments(NamedTuple):
    """Of some rows: how many, their sum ``[D]`` and products ``[D, D]``, float64."""

    rows: int
    total: torch.Tensor
    products: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor) -> Moments:
        return cls(len(rows), rows.sum(dim=0), rows.T @ rows)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.rows - other.rows, self.total - other.total, self.products - other.products)

    def mean(self, centre: bool) -> torch.Tensor:
        """``[D]``; zeros where it is not subtracted."""
        return self.total / self.rows if centre else torch.zeros_like(self.total)

    def axes(self, centre: bool) -> torch.Tensor:
        """``[D, D]``: eigenvectors of the covariance, of falling energy."""
        mean = self.mean(centre)
        return torch.linalg.eigh(self.products / self.rows - torch.outer(mean, mean)).eigenvectors.flip(1)


def folds(count: int, grids: Sequence[Grid]) -> list[torch.Tensor]:
    """Row numbers of each fold: neighbours, which say nearly the same, are in one, and so is a whole grid."""
    fold = torch.arange(count) * FOLDS // count
    for grid in grids:
        fold[grid.places()] = fold[grid.first].clone()
    return [(fold == number).nonzero()[:, 0] for number in fold.unique()]


def at_step(basis: Basis, step: float) -> Transform:
    """The coder with this quantiser step: rank, classes and tables from the basis's coefficients."""
    coefficients = basis.coefficients / np.float32(step)
    used = np.flatnonzero((np.abs(coefficients) > 0.5).mean(axis=0) > LEAST_USED)
    rank = int(used.max()) + 1 if len(used) else 1
    encode = basis.encode[:, :rank].float().contiguous()
    return with_tables(basis.mean.float(), encode, step, coefficients[:, :rank], basis.bands)


def with_tables(
    mean: torch.Tensor, encode: torch.Tensor, step: float, coefficients: np.ndarray, of_row: np.ndarray
) -> Transform:
    """The coder of this mean and basis, its classes and tables from the rows' coefficients ``[R, r]`` in steps and their bands ``[R]``."""
    classes = scale_classes(band_scales(coefficients, of_row))
    fitted = [_fit_class(values) for values in by_class(coefficients, of_row, classes)]
    return Transform(
        mean,
        encode,
        step,
        torch.from_numpy(classes.astype(np.uint8)),
        torch.cat([table.probabilities for table, _ in fitted]),
        torch.tensor([len(table.probabilities) for table, _ in fitted], dtype=torch.int32),
        torch.tensor([shrink for _, shrink in fitted], dtype=torch.float32),
    )


def by_class(coefficients: np.ndarray, of_row: np.ndarray, classes: np.ndarray) -> list[np.ndarray]:
    """The coefficients of each class ``[bands, r]``, band by band: two passes over all of them, however many classes there are."""
    found: list[list[np.ndarray]] = [[] for _ in range(classes.max() + 1)]
    for band in np.unique(of_row):
        columns = np.ascontiguousarray(coefficients[of_row == band].T)
        for number in np.unique(classes[band]):
            found[number].append(columns[classes[band] == number].reshape(-1))
    return [np.concatenate(each) if each else np.zeros(0, coefficients.dtype) for each in found]


def band_scales(coefficients: np.ndarray, of_row: np.ndarray) -> np.ndarray:
    """Root mean square ``[bands, r]`` of the coefficients in each band; a band that no row is in is taken as the average one."""
    overall = np.sqrt(np.square(coefficients, dtype=np.float64).mean(axis=0))
    scales = np.repeat(overall[None], spectrum.BANDS, axis=0)
    for band in np.unique(of_row):
        scales[band] = np.sqrt(np.square(coefficients[of_row == band], dtype=np.float64).mean(axis=0))
    return scales


def scale_classes(scales: np.ndarray) -> np.ndarray:
    """Class numbers 0 … of scales, without gaps, the largest first."""
    octaves = np.floor(np.log2(np.clip(scales, 2.0**-6, 2.0**16)) * CLASSES_PER_OCTAVE).astype(np.int64)
    return np.unique(-octaves, return_inverse=True)[1].reshape(scales.shape)


def _fit_class(values: np.ndarray) -> tuple[Table, float]:
    """Table and bin shift of one class from its values in steps; a Laplace distribution fills what was not seen."""
    if not len(values):
        return fit_table(np.zeros(1, dtype=np.int64), -1, 1), 0.0
    symbols = np.rint(values).astype(np.int64)
    scale = max(float(np.abs(values).mean()), 1e-3)
    largest = min(LARGEST, int(12 * scale) + 15)
    prior = np.exp(-np.abs(np.arange(-largest, largest + 1)) / scale)
    prior = prior / prior.sum() * (8 + 2 * scale) + 1e-4
    if scale > 4:  # many symbols, few of each: neighbours are about as likely
        reach = min(int(scale / 4), largest)
        seen = np.bincount(np.clip(symbols, -largest, largest) + largest, minlength=2 * largest + 1)
        prior += np.convolve(seen, np.ones(2 * reach + 1) / (2 * reach + 1), mode="same")
    table = fit_table(symbols if scale <= 4 else symbols[:0], -largest, largest, prior)
    nonzero = symbols != 0
    inward = float((np.abs(symbols) - np.abs(values))[nonzero].mean()) if nonzero.any() else 0.0
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
