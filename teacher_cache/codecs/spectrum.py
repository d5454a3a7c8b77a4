"""Rows that lie on a grid, as spatial frequencies: an orthonormal cosine transform over the grid, dimension by dimension.

Neighbouring vision tokens say nearly the same (correlation 0.9 on the demo world): their frequencies are few large and many small
numbers, which code in a third to a half fewer bytes at the same error. Rows outside every grid stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from teacher_cache.errors import CacheError

EDGES = (0.0, 0.07, 0.12, 0.2, 0.35, 0.6, 1.0)
"""Bands of frequency u/height + v/width: the constant alone, then up to each edge; finer where the energy is."""
BANDS = len(EDGES) + 2
NO_GRID = 0
MOST_GRIDS = 4096


class Grid(NamedTuple):
    """Row (i, j) of a grid lies at ``first + i·stride + j`` (stride > width: tokens between, such as newlines)."""

    first: int
    height: int
    width: int
    stride: int

    def places(self) -> torch.Tensor:
        """int64 ``[height, width]``."""
        return self.first + torch.arange(self.height)[:, None] * self.stride + torch.arange(self.width)[None]


def forward(values: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
    """``[…, R, r]`` with every grid's rows replaced by its frequencies: (u, v) stands at the place of row (u, v)."""
    return _transform(values, grids, inverse=False)


def inverse(values: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
    """The rows that ``forward`` was given."""
    return _transform(values, grids, inverse=True)


def _transform(values: torch.Tensor, grids: Sequence[Grid], inverse: bool) -> torch.Tensor:
    if not grids:
        return values
    result = values.clone()
    for grid in grids:
        down, across = (cosines(size, values.dtype, values.device) for size in (grid.height, grid.width))
        if inverse:
            down, across = down.T, across.T
        places = grid.places().to(values.device)
        block = torch.matmul(across, values[..., places, :])  # over the columns of every row
        block = torch.matmul(down, block.flatten(-2))  # [height, width·r]
        result[..., places, :] = block.unflatten(-1, (grid.width, -1))
    return result


@lru_cache(maxsize=64)
def cosines(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Orthonormal DCT-II matrix ``[size, size]``: frequencies × places."""
    at = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.pi / size * (at[None] + 0.5) * at[:, None]) * (2.0 / size) ** 0.5
    matrix[0] *= 0.5**0.5
    return matrix.to(device, dtype)


def bands(rows: int, grids: Sequence[Grid]) -> np.ndarray:
    """uint8 ``[R]``: 0 outside every grid, 1 for the constant, then by rising frequency."""
    result = np.full(rows, NO_GRID, dtype=np.uint8)
    for grid in grids:
        frequency = np.arange(grid.height)[:, None] / grid.height + np.arange(grid.width)[None] / grid.width
        result[grid.places().numpy()] = np.searchsorted(np.array(EDGES), frequency, side="left") + 1
    return result


def to_symbols(grids: Sequence[Grid]) -> np.ndarray:
    """int32 numbers that ``from_symbols`` reads, without their count."""
    return np.array(grids, dtype=np.int32).reshape(-1)


def from_symbols(symbols: np.ndarray, rows: int) -> tuple[Grid, ...]:
    """The grids; CacheError where one reaches beyond the rows or is no grid."""
    grids = tuple(Grid(*(int(number) for number in one)) for one in symbols.reshape(-1, 4))
    for grid in grids:
        end = grid.first + (grid.height - 1) * grid.stride + grid.width
        if min(grid.height, grid.width) < 1 or grid.stride < grid.width or grid.first < 0 or end > rows:
            raise CacheError(f"a coded record holds {grid} among {rows} rows: run `kdcli cache verify`")
    return grids
