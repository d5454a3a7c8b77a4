"""Several samples in one row of a batch: less padding for the same samples, terms and means.

A micro-batch of samples of many lengths, a row each, is mostly padding. Here its samples lie one behind the other in fewer, longer rows;
positions begin anew in each, and attention stays inside a sample (transformers makes that mask of the positions). Losses find their rows
by flat positions, so nothing else knows of it. Attention computes the masked entries of a long row too, so rows are no longer than pays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from student_train.division import balanced
from teacher_cache.preparing.batch import BatchPlace

SEPARATING = ("sdpa", "eager", "flex_attention")
"""Attention implementations that keep the samples of many rows apart."""
ONE_ROW = ("flash_attention_2", "flash_attention_3")
"""Those that do so in a single row alone, which costs them nothing."""


@dataclass(frozen=True)
class Packing:
    """What a student's rows cost.

    Attributes:
        one_row: all samples lie in one row. even: length of a row in tokens whose attention takes as many operations as the rest of the
            decoder's layers. keeps_scores: attention holds its scores of a batch in memory; packed, they are no more than of a row each.
    """

    one_row: bool = False
    even: float = math.inf
    keeps_scores: bool = False

    def cost(self, rows: int, longest: int) -> float:
        """Of a batch, in tokens without attention."""
        return rows * longest * (1 + longest / self.even)


def packed_rows(lengths: Sequence[int], packing: Packing) -> list[list[int]]:
    """Samples of each row, in order: of all numbers of rows the cheapest, the most rows among equals. lengths: tokens of the samples."""
    if packing.one_row:
        return [list(range(len(lengths)))]

    def longest(rows: Sequence[Sequence[int]]) -> int:
        return max(sum(lengths[i] for i in row) for row in rows)

    layouts = [balanced(lengths, rows) for rows in range(len(lengths), 0, -1)]
    if packing.keeps_scores:
        most = len(lengths) * max(lengths) ** 2
        layouts = [rows for rows in layouts if len(rows) * longest(rows) ** 2 <= most]
    return min(layouts, key=lambda rows: packing.cost(len(rows), longest(rows)))


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
