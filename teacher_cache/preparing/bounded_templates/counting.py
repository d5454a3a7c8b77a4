"""What is left to the row that this thread renders, and what takes of it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from threading import local
from types import GeneratorType
from typing import Any

from jinja2.utils import Namespace
from markupsafe import Markup

TURNS = 1_000_000
"""Of loops, calls and filters, for one row. A row of 1,000 turns takes some 40,000."""
SECONDS = 2.0
"""Of this thread's processor time, for one row; plain ones take a thousandth of it."""
LARGEST = 4_000_000
"""Characters (and items) of one value: a million tokens."""
ITEM = 8
"""Characters that an item of a list stands for."""
MADE = 64_000_000
"""Characters of all larger values together that one row makes."""
SMALL = 1024
"""Characters of a value that is not counted."""
MADE_ONE_BY_ONE = (GeneratorType, map, filter, zip)
LAZY_KINDS = frozenset(MADE_ONE_BY_ONE)
LISTS: tuple[type, ...] = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))
WITH_LENGTH: frozenset[type] = frozenset({str, bytes, dict, Markup, *LISTS})
DEEPEST = 64
"""Lists in lists."""
LOOK_EVERY = 64
"""Turns between two looks at the clock."""
HEAVY = 4096
"""Characters or items of a value whose every use is a reason to look at the clock."""


class TooMuch(Exception):
    """What a template does is beyond a bound."""


class CountedRow:
    """What is left to the row that this thread renders."""

    __slots__ = ("known", "looks", "made", "turns", "until")

    def __init__(self) -> None:
        self.turns, self.made, self.looks = TURNS, MADE, 0
        self.until = 0.0  # of the thread's clock; 0: it was not looked at yet
        self.known: Known = {}


class Here(local):
    row: CountedRow | None = None


Known = dict[int, tuple[Any, int, int]]
"""By identity: the list (kept, so that no other takes its identity), its size, how deeply it is nested. No template changes a list."""
here = Here()


def turn(count: int = 1) -> None:
    row = here.row
    if row is None:
        return
    row.turns -= count
    row.looks += 1
    if row.turns < 0:
        raise TooMuch(f"it takes more than {TURNS:,} turns for one row")
    if not row.looks % LOOK_EVERY:
        clock(row)


def clock(row: CountedRow) -> None:
    now = time.thread_time()
    row.until = row.until or now + SECONDS
    if now > row.until:
        raise TooMuch(f"it takes more than {SECONDS:g} seconds for one row")


def heavy(values: Iterable[Any]) -> None:
    """A look at the clock where one of them is large."""
    for one in values:
        if type(one) in WITH_LENGTH and len(one) >= HEAVY and (row := here.row) is not None:
            clock(row)
            return


def kept(value: Any) -> Any:
    """``value``, where it is not too large to be stored, handed over or written."""
    kind = type(value)
    if kind is str:
        if len(value) < SMALL:
            return value
    elif kind is int or kind is bool or value is None:
        return value
    row = here.row
    if row is None or id(value) in row.known:
        return value
    size = measure(value)
    if size >= SMALL:
        row.made -= size
        if row.made < 0:
            raise TooMuch(f"it makes more than {MADE:,} characters for one row")
    return value


def measure(value: Any) -> int:
    """Characters and items, those that stand in several places counted in each."""
    row = here.row
    if row is None:
        return 0
    size, _ = _measured(value, row.known)
    limit(size)
    return size


def _measured(value: Any, known: Known) -> tuple[int, int]:
    """(size, depth)"""
    kind = type(value)
    if kind is str:
        return len(value), 0
    if kind in LISTS:
        parts = value
    elif isinstance(value, dict):
        parts = (*value.keys(), *value.values())
    elif isinstance(value, (str, bytes)):
        return len(value), 0
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    else:
        return 1, 0
    if found := known.get(id(value)):
        return found[1:]
    total, depth = 1, 0
    for one in parts:
        if isinstance(one, Namespace):
            raise TooMuch("it puts a namespace into a list")
        size, below = _measured(one, known)
        total += ITEM + size
        depth = max(depth, below + 1)
        if total > LARGEST:
            limit(total)
    if depth > DEEPEST:
        raise TooMuch("it puts lists into lists too deeply")
    known[id(value)] = value, total, depth
    return total, depth


def limit(size: int) -> None:
    if size > LARGEST and here.row is not None:
        raise TooMuch(f"it makes a value of more than {LARGEST:,} characters")


def taken(values: Any) -> Any:
    """What is made one by one, as a list within the bounds; anything else as it is."""
    if type(values) not in MADE_ONE_BY_ONE:
        return values
    listed, size = [], 0
    for one in values:
        turn()
        size += ITEM + measure(one)
        limit(size)
        listed.append(one)
    return listed
