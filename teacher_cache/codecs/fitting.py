"""Fits a transform coder on calibration rows: the basis in a given metric, classes of scale, a table for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from teacher_cache.codecs import spectrum
from teacher_cache.codecs.entropy import Table, fit_table
from teacher_cache.codecs.spectrum import Grid
from teacher_cache.codecs.transform import Transform
from teacher_cache.errors import KdcliError

LARGEST = 2047
CLASSES_PER_OCTAVE = 4
"""Dimensions share a table with those of about their own scale: fine enough to cost little, coarse enough to be fitted."""
LEAST_USED = 1e-3
"""A dimension whose symbol is zero in all but this share of the calibration rows is left out. Judged by use, not by variance: the
coefficients have heavy tails, and leaving out what has little variance tripled the KL of a sketch without its head."""


def fit(
    rows: torch.Tensor,
    root: torch.Tensor | None,
    step: float,
    centre: bool = True,
    grids: Sequence[Grid] = (),
) -> Transform:
    """Fit on calibration rows, on their device; the result is on the CPU.

    Args:
        rows: ``[R, D]``. root: S ``[D, D]``, square root of the metric; None: Euclidean.
        centre: subtract the mean first (False where inner products matter, which a mean would mix).
        grids: of all samples, among ``rows``.
    Raises:
        KdcliError: fewer rows than twice their width, where a covariance means nothing.
    """
    count, width = rows.shape
    if count < 2 * width:
        raise KdcliError(f"calibration saw {count} rows of width {width}: at least {2 * width} are needed")
    wide = rows.double()
    if not torch.isfinite(wide).all():
        raise KdcliError("calibration rows hold NaN or infinity")
    mean = wide.mean(dim=0) if centre else wide.new_zeros(width)
    centred = wide - mean if root is None else (wide - mean) @ root.double()
    basis = torch.linalg.eigh(centred.T @ centred / count).eigenvectors.flip(1)
    coefficients = spectrum.forward((centred @ (basis / step)).float().cpu(), grids).numpy()
    used = np.flatnonzero((np.abs(coefficients) > 0.5).mean(axis=0) > LEAST_USED)
    rank = int(used.max()) + 1 if len(used) else 1
    coefficients, basis = coefficients[:, :rank], basis[:, :rank]
    encode = (basis if root is None else root.double() @ basis).float().contiguous().cpu()
    return with_tables(mean.float().cpu(), encode, step, coefficients, spectrum.bands(count, grids))


def with_tables(
    mean: torch.Tensor, encode: torch.Tensor, step: float, coefficients: np.ndarray, of_row: np.ndarray
) -> Transform:
    """The coder of this mean and basis, its classes and tables from the rows' coefficients ``[R, r]`` in steps and their bands ``[R]``."""
    classes = scale_classes(band_scales(coefficients, of_row))
    of_symbol = classes[of_row]
    fitted = [_fit_class(coefficients[of_symbol == number]) for number in range(classes.max() + 1)]
    return Transform(
        mean,
        encode,
        step,
        torch.from_numpy(classes.astype(np.uint8)),
        torch.cat([table.probabilities for table, _ in fitted]),
        torch.tensor([len(table.probabilities) for table, _ in fitted], dtype=torch.int32),
        torch.tensor([shrink for _, shrink in fitted], dtype=torch.float32),
    )


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
