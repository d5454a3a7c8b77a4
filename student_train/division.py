"""The samples of a step, divided into micro-batches by their lengths, so that little of a batch is padding.

Which samples a step has is the order's business (``order.py``), and their means run over the whole step: only what lies in one batch
changes. Rows of their own take samples of like lengths; packed ones take as many tokens each.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

WIDEST = 4
"""Times ``micro_batch``: samples of one micro-batch at most, where they are short."""


def balanced(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """So many parts, as equal in tokens as the longest-first rule makes them; samples keep their order inside a part."""
    heap = [(0, part) for part in range(parts)]
    found: list[list[int]] = [[] for _ in range(parts)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, part = heapq.heappop(heap)
        found[part].append(i)
        heapq.heappush(heap, (tokens + lengths[i], part))
    return sorted(map(sorted, found))


def grouped(lengths: Sequence[int], parts: int, micro_batch: int) -> list[list[int]]:
    """So many parts of samples of like lengths, the longest first, with the least padding of all such divisions.

    Samples are sorted by length and cut: ``best[c][j]`` is the fewest positions that the first j take in c parts. No part takes more than
    ``micro_batch`` rows of the longest sample would, nor has more than ``WIDEST`` times as many rows.

    Args:
        parts: at least len(lengths) / micro_batch, at most len(lengths).
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    longest = np.array([lengths[i] for i in order], dtype=np.float64)
    rows = np.arange(1, min(len(order), WIDEST * micro_batch) + 1)
    first = np.arange(len(order) + 1)[:, None] - rows  # [end, rows - 1] of a part → where it begins
    begins = np.maximum(first, 0)
    cost = np.where(first >= 0, rows * longest[np.minimum(begins, len(order) - 1)], np.inf)
    cost[cost > micro_batch * longest[0]] = np.inf
    best, cuts = np.full(len(order) + 1, np.inf), []
    best[0] = 0.0
    for _ in range(parts):
        found = best[begins] + cost
        chosen = found.argmin(axis=1)
        best = np.take_along_axis(found, chosen[:, None], axis=1)[:, 0]
        cuts.append(rows[chosen])
    end, parted = len(order), []
    for size in reversed(cuts):
        begin = end - int(size[end])
        parted.append(sorted(order[begin:end]))
        end = begin
    return parted[::-1]
