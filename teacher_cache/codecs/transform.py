"""Transform coder: rows ``[R, D]`` → a few small integers each, by a KLT in a given metric and one uniform quantiser step.

The step is the same for every dimension, which is reverse water-filling: dimensions with less energy than the step quantise to zero
and cost nearly nothing. Rows on a grid (vision tokens) are transformed over the grid as well (``codecs.spectrum``). Fitted once on
calibration rows, then fixed: basis, ranks and entropy tables lie beside the cache.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from teacher_cache.codecs import adaptive, entropy, spectrum
from teacher_cache.codecs.entropy import MOST_ROWS, Decoder, Stream
from teacher_cache.codecs.entropy_tables import Table
from teacher_cache.codecs.spectrum import Grid
from teacher_cache.codecs.symbol_order import SymbolOrder
from teacher_cache.errors import CacheError, KdcliError

VERSION = 2
READABLE = (1, 2)
NUMBERS = Table(0, torch.full((MOST_ROWS + 1,), 1.0 / (MOST_ROWS + 1)))
"""Counts and places of grids: 18 bits each."""
MOST_KEPT = 1 << 23
"""Symbols of all layouts whose order is kept for further records, 8 to 16 bytes each: 729 tokens of width 3,584 are 2.6 million."""
ALWAYS_ADAPTIVE = 1 << 18
"""Symbols of a record from which on it is coded adaptively without a look at what tables would cost: a per cent or two less on rows like
those of the calibration, and 4 ms and more of a core to read them."""
MEMBER_BYTES = 72
"""Of a second tensor in a tar member."""
CPU = torch.device("cpu")
_KEEPING = threading.Lock()
"""Of all coders: rows are encoded in several threads."""


def check_version(version: int) -> None:
    """CacheError for one that this program does not know."""
    if version not in READABLE:
        known = ", ".join(map(str, READABLE))
        raise CacheError(f"codec sketch version {version} is not readable: this kdcli reads {known}")


class Quantised(NamedTuple):
    """A record's symbols as they are written, int16 or int32 ``[N]``, and their layout."""

    symbols: torch.Tensor
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

    def order(self, rows: int, grids: tuple[Grid, ...]) -> SymbolOrder:
        """A function of the layout, which records share."""
        if found := self._orders.get((rows, grids)):
            return found
        made = SymbolOrder(self.classes.numpy(), self._tables, rows, grids)
        with _KEEPING:
            self._keep(made, (rows, grids))
        return made

    def _keep(self, made: SymbolOrder, layout: tuple[int, tuple[Grid, ...]]) -> None:
        if made.symbols <= MOST_KEPT:
            while self._orders and made.symbols + sum(one.symbols for one in self._orders.values()) > MOST_KEPT:
                self._orders.pop(next(iter(self._orders)))
            self._orders[layout] = made

    @cached_property
    def _placed(self) -> dict[torch.device, tuple[torch.Tensor, ...]]:
        """Device → mean and encode, where they have been used."""
        return {}

    def _on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        if device not in self._placed:
            self._placed[device] = tuple(one.to(device) for one in (self.mean, self.encode))
        return self._placed[device]

    def quantise(self, rows: torch.Tensor, grids: Sequence[Grid] = ()) -> torch.Tensor:
        """int16 ``[R, r]`` of rows ``[R, D]``, int32 where one does not fit, made on their device; KdcliError where one is NaN or beyond
        any integer, which would be stored as garbage."""
        mean, encode = self._on(rows.device)
        values = spectrum.forward((rows.to(torch.float32) - mean) @ encode, grids)
        values = (values / self.step).round_()
        largest = float(values.abs().max()) if values.numel() else 0.0
        if not largest < 2**31:  # NaN is not below either
            raise KdcliError("hidden states hold NaN, infinity or values too large to be coded")
        return values.to(torch.int16 if largest < 2**15 else torch.int32)

    def record(
        self, symbols: torch.Tensor, grids: Sequence[Grid] = (), before: Sequence[Stream] = (), version: int = VERSION
    ) -> dict[str, torch.Tensor]:
        """What is stored of quantised rows; they come into their order on their device.

        Version 2 writes many symbols, and those that the tables do not fit, as ``symbols``, by ``adaptive``; all others are streams of
        ``coded`` as all were in version 1.

        Args:
            before: streams that are read before this coder reads.
        """
        order, ordered = self._ordered(symbols, grids)
        rows, layout = len(symbols), self._layout_streams(grids)
        tabled: dict[str, torch.Tensor] = {}
        if version == 1 or len(ordered) < ALWAYS_ADAPTIVE:
            tabled = {"coded": entropy.encode([*before, *layout, *self._class_streams(order, ordered)], rows)}
        if version == 1 or len(ordered) < adaptive.LEAST_GROUP:
            return tabled
        own = {"coded": entropy.encode([*before, *layout], rows), "symbols": adaptive.encode(ordered, order.counts)}
        spent = sum(map(len, own.values())) + MEMBER_BYTES
        return own if not tabled or spent < len(tabled["coded"]) else tabled

    def streams(self, symbols: torch.Tensor, grids: Sequence[Grid] = ()) -> list[Stream]:
        """The layout, then one stream a class: what version 1 is, and what ``entropy.encode`` wants."""
        order, ordered = self._ordered(symbols, grids)
        return [*self._layout_streams(grids), *self._class_streams(order, ordered)]

    def _ordered(self, symbols: torch.Tensor, grids: Sequence[Grid]) -> tuple[SymbolOrder, np.ndarray]:
        order = self.order(len(symbols), tuple(grids))
        return order, symbols.reshape(-1).index_select(0, order.places_on(symbols.device)).cpu().numpy()

    @staticmethod
    def _layout_streams(grids: Sequence[Grid]) -> list[Stream]:
        return [(np.array([len(grids)], dtype=np.int32), NUMBERS), (spectrum.to_symbols(grids), NUMBERS)]

    def _class_streams(self, order: SymbolOrder, ordered: np.ndarray) -> list[Stream]:
        return list(zip(np.split(ordered, np.cumsum(order.counts)[:-1]), self._tables))

    def read(self, stored: Mapping[str, torch.Tensor], decoder: Decoder) -> Quantised:
        """The record of either version as it was written, for ``restore``; ``decoder``: of its ``coded``, which ends here."""
        count = int(decoder.take(1, NUMBERS)[0])
        if not 0 <= count <= spectrum.MOST_GRIDS:
            raise CacheError(f"a coded record claims {count} grids: run `kdcli cache verify`")
        grids = spectrum.from_symbols(decoder.take(4 * count, NUMBERS), decoder.rows) if count else ()
        decoder.promise(decoder.rows * self.rank)
        order = self.order(decoder.rows, grids)
        if "symbols" in stored:
            symbols = adaptive.decode(stored["symbols"], order.counts)
        else:
            symbols = torch.from_numpy(decoder.take_all(order.layout))
        decoder.finish()
        return Quantised(symbols, decoder.rows, grids)

    def restore(self, records: Sequence[Quantised], device: torch.device = CPU) -> list[torch.Tensor]:
        """float32 ``[R, r]`` of each on ``device``: y as the reader sees it, bins at their mean value; those of one layout all at once."""
        alike: dict[tuple[int, tuple[Grid, ...]], list[int]] = {}
        for number, one in enumerate(records):
            alike.setdefault((one.rows, one.grids), []).append(number)
        found: dict[int, torch.Tensor] = {}
        for (rows, grids), numbers in alike.items():
            order = self.order(rows, grids)
            symbols = torch.stack([records[number].symbols.to(device) for number in numbers]).to(torch.float32)
            counts = torch.tensor(order.counts, device=device)
            shrink = torch.repeat_interleave(self.shrink.to(device), counts, output_size=order.symbols)
            values = (symbols - symbols.sign().mul_(shrink)).mul_(self.step).index_select(1, order.back_on(device))
            found.update(zip(numbers, spectrum.inverse(values.view(len(numbers), rows, self.rank), grids).unbind()))
        return [found[number] for number in range(len(records))]
