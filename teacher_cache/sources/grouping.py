"""Rows that stand one after the other in files → row groups that a read finds by seeking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from teacher_cache.records import RowGroup


@dataclass(frozen=True)
class RowRange:
    """One row as a scan sees it: bytes ``begin`` to ``end`` of its file, characters of text, images, and what else a read that begins
    here wants to know (``at``, JSON-able)."""

    begin: int
    end: int
    characters: int
    images: int
    at: Mapping[str, Any]


def group_rows_of(
    file_count: int, ranges: Callable[[int], Iterator[RowRange]], group_rows: int, limit: int | None
) -> list[RowGroup]:
    """Groups of at most ``group_rows`` rows, none over two files, of the first ``limit`` rows.

    Their locator: ``{file, offset, end}`` and the ``at`` of the first row.

    Args:
        ranges: number of a file → its rows in order; a file behind the limit is not asked.
    """
    groups: list[RowGroup] = []
    start = 0
    for file in range(file_count):
        left = None if limit is None else limit - start
        if left == 0:
            break
        rows = islice(ranges(file), left)
        while chosen := list(islice(rows, group_rows)):
            locator = {"file": file, "offset": chosen[0].begin, "end": chosen[-1].end, **chosen[0].at}
            characters, images = sum(row.characters for row in chosen), sum(row.images for row in chosen)
            groups.append(RowGroup(start, len(chosen), locator, characters, images))
            start += len(chosen)
    return groups
