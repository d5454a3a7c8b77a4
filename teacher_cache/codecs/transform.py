"""Transform coder: rows ``[R, D]`` → a few small integers each, by a KLT in a given metric and one uniform quantiser step.

The step is the same for every dimension, which is reverse water-filling: dimensions with less energy than the step quantise to zero
and cost nearly nothing. Rows on a grid (vision tokens) are transformed over the grid as well (``codecs.spectrum``). Fitted once on
calibration rows, then fixed: basis, ranks and entropy tables lie beside the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from teacher_cache.codecs import spectrum
from teacher_cache.codecs.entropy import MOST_ROWS, Decoder, Layout, Stream, Table, fit_table, layout_of
from teacher_cache.codecs.spectrum import Grid
from teacher_cache.errors import CacheError, KdcliError

VERSION = 1
LARGEST = 2047
CLASSES_PER_OCTAVE = 4
"""Dimensions share a table with those of about their own scale: fine enough to cost little, coarse enough to be fitted."""
LEAST_USED = 1e-3
"""A dimension whose symbol is zero in all but this share of the calibration rows is left out. Judged by use, not by variance: the
coefficients have heavy tails, and leaving out what has little variance tripled the KL of a sketch without its head."""
NUMBERS = Table(0, torch.full((MOST_ROWS + 1,), 1.0 / (MOST_ROWS + 1)))
"""Counts and places of grids: 18 bits each."""
MOST_KEPT = 1 << 23
"""Symbols of all layouts whose order is kept for further records, about 16 bytes each: 729 tokens of width 3,584 are 2.6 million."""


@dataclass(frozen=True)
class SymbolOrder:
    """How a layout's symbols are written: places of all symbols by class, and symbols of each class with its table and shrink."""

    places: np.ndarray
    counts: list[int]
    tables: Sequence[Table]
    shrink_of: np.ndarray
    _placed: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def layout(self) -> Layout:
        """How they are read."""
        return layout_of(self.tables, self.counts)

    @cached_property
    def shrink(self) -> np.ndarray:
        """Of every symbol, in their order."""
        return np.repeat(self.shrink_of, self.counts)

    def places_on(self, device: torch.device) -> torch.Tensor:
        """int32"""
        if device not in self._placed:
            self._placed[device] = torch.from_numpy(self.places).to(device)
        return self._placed[device]


class Quantised(NamedTuple):
    """A record's symbols, int32 in the order of its layout, and that layout."""

    symbols: np.ndarray
    rows: int
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class Transform:
    """A fitted coder.

    Attributes:
        mean: float32 ``[D]``. encode: float32 ``[D, r]``: y = (h − mean)·encode. step: of the quantiser, in units of y.
        classes: uint8 ``[bands, r]``: the table of each dimension in each band of spatial frequency.
        tables: float32, the classes' tables one after the other, symbols −n … n and the escape; sizes: int32 ``[C]`` of each.
        shrink: float32 ``[C]``: how far, in steps, values of a bin lie below its middle on average.
    """

    mean: torch.Tensor
    encode: torch.Tensor
    step: float
    classes: torch.Tensor
    tables: torch.Tensor
    sizes: torch.Tensor
    shrink: torch.Tensor

    @property
    def rank(self) -> int:
        return self.encode.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """For a calibration file."""
        names = ("mean", "encode", "classes", "tables", "sizes", "shrink")
        return {**{name: getattr(self, name) for name in names}, "step": torch.tensor([self.step])}

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> Transform:
        names = ("mean", "encode", "classes", "tables", "sizes", "shrink")
        if missing := sorted({*names, "step"} - set(tensors)):
            raise CacheError(f"a calibration lacks {', '.join(missing)}: it is of another kind of field")
        made = cls(step=float(tensors["step"]), **{name: tensors[name] for name in names})
        if wrong := made._misfit():
            raise CacheError(f"a calibration cannot be used ({wrong}): it is damaged, or of another kind of field")
        return made

    def _misfit(self) -> str:
        """What does not fit together, in words."""
        kinds = dict.fromkeys(("mean", "encode", "tables", "shrink"), torch.float32)
        kinds |= {"classes": torch.uint8, "sizes": torch.int32}
        if wrong := [name for name, kind in kinds.items() if getattr(self, name).dtype != kind]:
            return f"the type of {', '.join(wrong)}"
        shapes = [tuple(one.shape) for one in (self.mean, self.encode, self.classes, self.sizes, self.shrink)]
        width, count, rank = len(self.mean.reshape(-1)), len(self.sizes.reshape(-1)), self.encode.shape[-1:].numel()
        if shapes != [(width,), (width, rank), (spectrum.BANDS, rank), (count,), (count,)] or self.tables.ndim != 1:
            return f"shapes {shapes}"
        if not 0 < self.step < float("inf") or not bool(torch.isfinite(self.shrink).all()):
            return f"step {self.step}"
        if bool((self.sizes < 2).any()) or int(self.sizes.sum()) != len(self.tables):
            return f"{int(self.sizes.sum())} table entries of {len(self.tables)}"
        return "" if not self.classes.numel() or int(self.classes.max()) < count else "a class without a table"

    @cached_property
    def _tables(self) -> list[Table]:
        return [Table(-(len(one) - 2) // 2, one) for one in self.tables.split(self.sizes.tolist())]

    @cached_property
    def _orders(self) -> dict[tuple[int, tuple[Grid, ...]], SymbolOrder]:
        return {}

    def _order(self, rows: int, grids: tuple[Grid, ...]) -> SymbolOrder:
        """A function of the layout, which records share."""
        if (rows, grids) in self._orders:
            return self._orders[rows, grids]
        classes = self.classes.numpy()[spectrum.bands(rows, grids)].reshape(-1)
        counts = np.bincount(classes, minlength=len(self._tables)).tolist()
        made = SymbolOrder(
            np.argsort(classes, kind="stable").astype(np.int32),
            counts,
            self._tables,
            self.shrink.numpy(),
        )
        if classes.size <= MOST_KEPT:
            while self._orders and classes.size + sum(one.places.size for one in self._orders.values()) > MOST_KEPT:
                self._orders.pop(next(iter(self._orders)))
            self._orders[rows, grids] = made
        return made

    @cached_property
    def _placed(self) -> dict[torch.device, tuple[torch.Tensor, torch.Tensor]]:
        """Device → mean and encode, where they have been used."""
        return {}

    def quantise(self, rows: torch.Tensor, grids: Sequence[Grid] = ()) -> torch.Tensor:
        """int32 ``[R, r]`` of rows ``[R, D]``, made on their device; KdcliError where one is NaN or beyond any integer, which would be
        stored as garbage."""
        if rows.device not in self._placed:
            self._placed[rows.device] = (self.mean.to(rows.device), self.encode.to(rows.device))
        mean, encode = self._placed[rows.device]
        values = spectrum.forward((rows.to(torch.float32) - mean) @ encode, grids)
        values = (values / self.step).round_()
        if values.numel() and not values.abs().max() < 2**31:  # NaN is not below either
            raise KdcliError("hidden states hold NaN, infinity or values too large to be coded")
        return values.to(torch.int32)

    def streams(self, symbols: torch.Tensor, grids: Sequence[Grid] = ()) -> list[Stream]:
        """The layout, then one stream a table: what ``entropy.encode`` wants. Symbols come into their order on their device."""
        order = self._order(len(symbols), tuple(grids))
        ordered = symbols.reshape(-1).index_select(0, order.places_on(symbols.device)).cpu().numpy()
        stops = np.cumsum(order.counts).tolist()
        parts = [ordered[start:stop] for start, stop in zip([0, *stops], stops)]
        layout = [(np.array([len(grids)], dtype=np.int32), NUMBERS), (spectrum.to_symbols(grids), NUMBERS)]
        return [*layout, *zip(parts, self._tables)]

    def read(self, decoder: Decoder) -> torch.Tensor:
        """float32 ``[R, r]``: y as the reader sees it, bins at their mean value."""
        return self.restore([self.read_symbols(decoder)])[0]

    def read_symbols(self, decoder: Decoder) -> Quantised:
        """The next record as it was written, for ``restore``."""
        count = int(decoder.take(1, NUMBERS)[0])
        if not 0 <= count <= spectrum.MOST_GRIDS:
            raise CacheError(f"a coded record claims {count} grids: run `kdcli cache verify`")
        grids = spectrum.from_symbols(decoder.take(4 * count, NUMBERS), decoder.rows) if count else ()
        decoder.promise(decoder.rows * self.rank)
        return Quantised(decoder.take_all(self._order(decoder.rows, grids).layout), decoder.rows, grids)

    def restore(self, records: Sequence[Quantised]) -> list[torch.Tensor]:
        """float32 ``[R, r]`` of each; those of one layout all at once."""
        alike: dict[tuple[int, tuple[Grid, ...]], list[int]] = {}
        for number, one in enumerate(records):
            alike.setdefault((one.rows, one.grids), []).append(number)
        found: dict[int, torch.Tensor] = {}
        for (rows, grids), numbers in alike.items():
            order = self._order(rows, grids)
            symbols = np.stack([records[number].symbols for number in numbers]).astype(np.float32)
            symbols -= np.sign(symbols) * order.shrink
            symbols *= np.float32(self.step)
            values = np.empty_like(symbols)
            values[:, order.places] = symbols
            shaped = torch.from_numpy(values).reshape(len(numbers), rows, self.rank)
            found.update(zip(numbers, spectrum.inverse(shaped, grids).unbind()))
        return [found[number] for number in range(len(records))]


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
    of_row = spectrum.bands(count, grids)
    classes = scale_classes(band_scales(coefficients, of_row))
    of_symbol = classes[of_row]
    fitted = [_fit_class(coefficients[of_symbol == number]) for number in range(classes.max() + 1)]
    return Transform(
        mean.float().cpu(),
        (basis if root is None else root.double() @ basis).float().contiguous().cpu(),
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
