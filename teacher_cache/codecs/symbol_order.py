"""The order in which a transform coder's symbols are written: by class of scale, so that what lies together is about as large."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from teacher_cache.codecs import spectrum
from teacher_cache.codecs.entropy import Layout, layout_of
from teacher_cache.codecs.entropy_tables import Table
from teacher_cache.codecs.spectrum import Grid


class SymbolOrder:
    """Where the symbols of a layout stand when they are written: by class, and inside of a class as they come.

    Attributes:
        counts: symbols of each class.
    """

    def __init__(self, classes: np.ndarray, tables: Sequence[Table], rows: int, grids: tuple[Grid, ...]):
        """classes: uint8 ``[bands, r]``."""
        self._classes, self._tables, self._of_row = classes, tables, spectrum.bands(rows, grids)
        self._of_band = np.stack([np.bincount(one, minlength=len(tables)) for one in classes])
        rows_of_band = np.bincount(self._of_row, minlength=spectrum.BANDS)
        self.counts: list[int] = (rows_of_band @ self._of_band).tolist()
        self._placed: dict[torch.device, torch.Tensor] = {}
        self._back: dict[torch.device, torch.Tensor] = {}

    @property
    def symbols(self) -> int:
        return self._classes.shape[1] * len(self._of_row)

    @cached_property
    def layout(self) -> Layout:
        """How they are read under the classes' tables."""
        return layout_of(self._tables, self.counts)

    def places_on(self, device: torch.device) -> torch.Tensor:
        """int32 ``[N]``: the place in ``[R, r]`` of every symbol as they are written."""
        if device not in self._placed:
            self._placed[device] = torch.from_numpy(self.places()) if device.type == "cpu" else self.sorted_on(device)
        return self._placed[device]

    def back_on(self, device: torch.device) -> torch.Tensor:
        """int32 ``[N]``: for every place in ``[R, r]`` which of the symbols, as they are written, it has."""
        if device not in self._back:
            places = self.places_on(device).long()
            back = torch.empty(len(places), dtype=torch.int32, device=device)
            back[places] = torch.arange(len(places), dtype=torch.int32, device=device)
            self._back[device] = back
        return self._back[device]

    def sorted_on(self, device: torch.device) -> torch.Tensor:
        """``places``, by sorting: what a GPU does best."""
        classes = torch.from_numpy(self._classes).to(device)[torch.from_numpy(self._of_row).to(device).long()]
        return torch.sort(classes.reshape(-1), stable=True).indices.to(torch.int32)

    def places(self) -> np.ndarray:
        """int32 ``[N]``, block by block (a class in a band): a tenth of sorting's time on a processor."""
        found = np.empty(self.symbols, dtype=np.int32)
        rank = self._classes.shape[1]
        each = self._of_band[self._of_row]  # [R, C]: symbols that a row has of each class
        first = np.cumsum(each, axis=0) - each + np.cumsum([0, *self.counts[:-1]])
        for band in np.unique(self._of_row):
            rows = np.flatnonzero(self._of_row == band).astype(np.int32)
            by_class = np.argsort(self._classes[band], kind="stable").astype(np.int32)
            stops = np.cumsum(self._of_band[band])
            for number, dims in enumerate(np.split(by_class, stops[:-1])):
                if len(dims):
                    into = first[rows, number][:, None] + np.arange(len(dims))
                    found[into] = rows[:, None] * rank + dims
        return found
