"""Values of a row that no reader made: text that can be stored, ids, further columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from teacher_cache.errors import SkipSample

ANSWERS = "answers"
"""The one column of several values that a row keeps: reference answers, by which an evaluation scores."""


@dataclass(frozen=True)
class Unparsed:
    """A row whose borders are certain but whose value Python cannot hold; ``why`` goes into the skip record."""

    why: str


def row_object(value: Any) -> Mapping[str, Any]:
    """The row as an object.

    Raises:
        SkipSample: bad_row.
    """
    if isinstance(value, Unparsed):
        raise SkipSample("bad_row", value.why)
    if not isinstance(value, Mapping):
        raise SkipSample("bad_row", f"the row is {type(value).__name__}, not an object")
    return value


def is_given(value: Any) -> bool:
    """False for what stands for nothing: null, false, and text, lists and objects that are empty."""
    return value is not None and value is not False and value not in ("", [], {})


def checked_text(value: Any, what: str) -> str:
    """``value`` if it is text that UTF-8 can write.

    Raises:
        SkipSample: bad_row. A lone surrogate (``\\ud800`` in json) is legal there but can be neither hashed nor stored.
    """
    if not isinstance(value, str):
        raise SkipSample("bad_row", f"{what} is {kind_of(value)}, not text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise SkipSample("bad_row", f"{what} holds half of a surrogate pair at character {error.start}") from error
    return value


def source_id_of(value: Any) -> str:
    """Ids are text or numbers in the wild, and sometimes absent (then empty).

    Raises:
        SkipSample: bad_row.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return checked_text(value, "'id'")
    if isinstance(value, int | float):
        return str(value)
    raise SkipSample("bad_row", f"'id' is {kind_of(value)}, not text or a number")


def extra_of(row: Mapping[str, Any], known: Set[str]) -> dict[str, Any]:
    """Further scalar columns, and ``answers``; other nested values, nulls and numbers that json cannot carry on are left out.

    Raises:
        SkipSample: bad_row.
    """
    extra: dict[str, Any] = {}
    for name, value in row.items():
        if name == ANSWERS and name not in known and (answers := _answers(value)):
            extra[name] = answers
        if name in known or not isinstance(value, str | bool | int | float):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            continue
        if isinstance(value, str):
            checked_text(value, repr(name))
        extra[checked_text(name, "a column's name")] = value
    return extra


def _answers(value: Any) -> list[str]:
    """``["2", "two"]``, numbers too, or ``[{"answer": "2", …}]`` as VQA writes them → texts; empty: nothing of the kind."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return []
    texts = [one.get("answer") if isinstance(one, Mapping) else one for one in value]
    if not all(isinstance(one, str | int | float) for one in texts):
        return []
    return [checked_text(str(one), repr(ANSWERS)) for one in texts]


def kind_of(value: Any) -> str:
    return "absent or null" if value is None else type(value).__name__
