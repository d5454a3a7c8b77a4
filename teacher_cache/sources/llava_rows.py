"""A LLaVA row as Python values (from json or parquet) → turns, id and extra columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from teacher_cache.errors import SkipRow
from teacher_cache.records import Turn

ROLE_OF = {"human": "user", "gpt": "assistant", "system": "system"}

ANSWERS = "answers"
"""The one column of several values that a row keeps: reference answers, by which an evaluation scores."""


def checked_text(value: Any, what: str) -> str:
    """``value`` if it is text that UTF-8 can write.

    Raises:
        SkipRow: bad_row. A lone surrogate (``\\ud800`` in json) is legal there but can be neither hashed nor stored.
    """
    if not isinstance(value, str):
        raise SkipRow("bad_row", f"{what} is {_kind(value)}, not text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise SkipRow("bad_row", f"{what} holds half of a surrogate pair at character {error.start}") from error
    return value


def turns_of(conversations: Any) -> tuple[Turn, ...]:
    """``[{from, value, …}]`` → turns; further keys of a turn are ignored.

    Raises:
        SkipRow: bad_row.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str | bytes):
        raise SkipRow("bad_row", f"'conversations' is {_kind(conversations)}, not a list")
    turns = []
    for number, turn in enumerate(conversations):
        if not isinstance(turn, Mapping):
            raise SkipRow("bad_row", f"turn {number} is {_kind(turn)}, not an object")
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in ROLE_OF:
            raise SkipRow("bad_row", f"turn {number} is from {str(speaker)[:40]!r}, not one of {', '.join(ROLE_OF)}")
        turns.append(Turn(ROLE_OF[speaker], checked_text(turn.get("value"), f"'value' of turn {number}")))
    return tuple(turns)


def source_id_of(value: Any) -> str:
    """Ids are text or numbers in the wild, and sometimes absent (then empty).

    Raises:
        SkipRow: bad_row.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return checked_text(value, "'id'")
    if isinstance(value, int | float):
        return str(value)
    raise SkipRow("bad_row", f"'id' is {_kind(value)}, not text or a number")


def extra_of(row: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """Further scalar columns, and ``answers``; other nested values, nulls and numbers that json cannot carry on are left out.

    Raises:
        SkipRow: bad_row.
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


def _kind(value: Any) -> str:
    return "absent or null" if value is None else type(value).__name__
