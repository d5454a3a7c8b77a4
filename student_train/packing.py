"""Several samples in one row of a batch: less padding for the same samples, terms and means.

A micro-batch of samples of many lengths, a row each, is mostly padding. Here its samples lie one behind the other in fewer, longer rows;
positions begin anew in each, and attention stays inside a sample (transformers makes that mask of the positions). Losses find their rows
by flat positions, so nothing else knows of it. Time of attention grows with a row's length: the most rows are taken that are full enough.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from teacher_cache.preparing.batch import BatchPlace

FULL = 0.97
"""Share of real tokens from which on more, shorter rows are preferred to fuller ones."""
SEPARATING = ("sdpa", "eager", "flex_attention")
"""Attention implementations that keep the samples of many rows apart."""
ONE_ROW = ("flash_attention_2", "flash_attention_3")
"""Those that do so in a single row alone, which costs them nothing."""


def packed_rows(lengths: Sequence[int], one_row: bool = False) -> list[list[int]]:
    """Samples of each row, in order: the most rows that are full to ``FULL``; one row always is.

    Args:
        lengths: tokens of the samples. one_row: all samples lie in one row.
    """
    total = sum(lengths)
    for rows in range(1 if one_row else len(lengths), 1, -1):
        found = balanced(lengths, rows)
        if total >= FULL * rows * max(sum(lengths[i] for i in row) for row in found):
            return found
    return [list(range(len(lengths)))]


def balanced(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """So many rows, as equal in tokens as the longest-first rule makes them; samples keep their order inside a row."""
    heap = [(0, row) for row in range(rows)]
    found: list[list[int]] = [[] for _ in range(rows)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, row = heapq.heappop(heap)
        found[row].append(i)
        heapq.heappush(heap, (tokens + lengths[i], row))
    return sorted(map(sorted, found))


def places_of(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[list[int], list[BatchPlace]]:
    """(samples in the order of the flattened batch, their places)."""
    order, places = [], []
    for number, row in enumerate(rows):
        offset = 0
        for i in row:
            order.append(i)
            places.append(BatchPlace(number, offset))
            offset += lengths[i]
    return order, places
