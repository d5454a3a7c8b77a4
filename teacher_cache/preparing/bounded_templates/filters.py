"""What jinja's filters, calls and formats may do with what size: looked at before it is done."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from itertools import islice
from typing import Any

from jinja2.utils import _PassArg, pass_context

from teacher_cache.preparing.bounded_templates.counting import (
    HEAVY,
    ITEM,
    LARGEST,
    LOOK_EVERY,
    MADE,
    SMALL,
    WITH_LENGTH,
    TooMuch,
    clock,
    here,
    kept,
    limit,
    measure,
    taken,
    turn,
)
from teacher_cache.preparing.bounded_templates.tree import CUT, KEPT, LOOKED, TURN

BITS = 4096
"""Of a whole number."""
FEW_TURNS = 8
"""Of a loop that is counted as its most, without a look at the clock."""
SETS = 256
"""Characters that a text may be stripped of."""
FEW = ("replace", "string", "tojson", "capitalize", "title", "items", "lower", "upper", "safe", "float")
"""Filters that make little of little."""
LAZY = ("map", "select", "reject", "selectattr", "rejectattr")
SLOW = ("urlize", "striptags", "wordwrap", "pprint", "int", "xmlattr")
"""Filters whose time may grow with the square of their input."""
SLOW_INPUT = 1 << 14
BY_ATTRIBUTE = ("sort", "groupby", "unique", "min", "max", "sum", "join", *LAZY)
"""Filters that may look up an attribute (several, with dots and commas) of every item."""
LOOKED_INTO = {*BY_ATTRIBUTE, *SLOW, "indent", "tojson", "round", "replace", "format"}
"""Filters of whose arguments more is asked than their size."""
BACKWARDS = ("rfind", "rindex", "rsplit", "rpartition")
"""Methods whose time grows with the product of both texts."""
ENCODINGS = ("utf-8", "utf8", "utf-16", "utf-32", "ascii", "latin-1")
"""Of long texts; others may take the square of their length."""
WIDTHS = re.compile(r"%[^a-zA-Z%{}]*\*|:[^{}]*\{")
"""In a format: a width that comes from elsewhere."""
NUMBERS = re.compile(r"\d+", re.ASCII)


def is_light(args: tuple[Any, ...]) -> bool:
    """Whether a call has nothing but short texts and small numbers to store."""
    for one in args:
        kind = type(one)
        if kind is str:
            if len(one) > SETS:
                return False
        elif kind is int:
            if not -SETS < one < SETS:
                return False
        elif one is not None and kind is not bool:
            return False
    return True


@pass_context
def turn_filter(context: Any, values: Any) -> Any:
    """Of what a loop goes through: all its turns are counted before the first."""
    if type(values) is not list:
        values = taken(values)
        if not hasattr(values, "__len__"):
            return values
    if len(values) > FEW_TURNS:
        turn(len(values) + 1)
        return _Turns(values)
    if (row := here.row) is not None:  # the same, for the many short loops of honest templates
        row.turns -= FEW_TURNS
        row.looks += 1
        if row.turns < 0 or not row.looks % LOOK_EVERY:
            turn()
            clock(row)
    return values


class _Turns:
    """What a longer loop goes through, with looks at the clock on the way."""

    __slots__ = ("values",)

    def __init__(self, values: Any):
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        rest = iter(self.values)
        while some := list(islice(rest, LOOK_EVERY)):
            if (row := here.row) is not None:
                clock(row)
            yield from some


@pass_context
def kept_filter(context: Any, value: Any) -> Any:
    return value if type(value) is str and len(value) < SMALL else kept(value)


@pass_context
def looked_filter(context: Any, value: Any) -> Any:
    if type(value) in WITH_LENGTH and len(value) >= HEAVY and (row := here.row) is not None:
        clock(row)
    return value


@pass_context
def cut_filter(context: Any, value: Any) -> Any:
    """A part of a list counts by its items alone: what is in them was there before."""
    if type(value) not in (list, tuple):
        return kept_filter(context, value)
    if len(value) >= SMALL and (row := here.row) is not None:
        clock(row)
        row.made -= ITEM * len(value)
        if row.made < 0:
            raise TooMuch(f"it makes more than {MADE:,} characters for one row")
    return value


OWN: dict[str, Callable[..., Any]] = {
    TURN: turn_filter,
    KEPT: kept_filter,
    LOOKED: looked_filter,
    CUT: cut_filter,
}
"""Filters that the tree of a template is given (``Counted``)."""


def trim(value: Any, chars: str | None = None) -> str:
    """jinja's own, of few characters."""
    if chars is not None and len(chars) > SETS:
        raise TooMuch("it strips a text of too many characters")
    return (value if isinstance(value, str) else str(kept(value))).strip(chars)


def guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if _PassArg.from_obj(function) else 0

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        turn()
        if not kwargs and name in FEW and is_light(args[first:]):
            return function(*args)
        if name not in LAZY:
            args = tuple(taken(one) for one in args)
        given = [*args, *kwargs.values()]
        check_given(given)
        if name not in LOOKED_INTO:
            return kept(function(*args, **kwargs))
        texts: list[Any] = [one for one in given if isinstance(one, (str, bytes))]
        numbers = [abs(one) for one in given if isinstance(one, int)]
        if name in LAZY and texts and isinstance(args[1 if len(args) > 1 else 0], str) and len(texts[0]) > SLOW_INPUT:
            raise TooMuch(f"its filter {name} goes through a long text")
        if name in SLOW and any(
            measure(one) > SLOW_INPUT for one in given if isinstance(one, (str, list, tuple, dict))
        ):
            raise TooMuch(f"its filter {name} is given a long text")
        if name == "indent" and numbers and texts:
            limit(len(texts[0]) + (texts[0].count("\n") + 1) * max(numbers))
        if name == "tojson" and len(given) > first + 1:
            rest = sum(measure(one) for one in given[first + 1 :])
            limit(measure(args[first]) * max([rest, *numbers]))
        if name in BY_ATTRIBUTE:
            _check_by_attribute(name, given[first:], kwargs, texts)
        if name == "indent" and len(texts) > 1:
            limit((texts[0].count("\n") + 1) * max(map(len, texts[1:])))
        if name == "round" and len(numbers) and max(numbers[-1:]) > SLOW_INPUT and len(given) > 1:
            raise TooMuch("it rounds to too many digits")
        if name == "replace" and len(texts) > 2:
            check_method("replace", texts[0], tuple(texts[1:]))
        if name == "format" and texts:
            check_format(str(texts[0]), tuple(given[1:]))
        if name == "join":
            _check_join(given)
        return kept(function(*args, **kwargs))

    return guarded


def _check_by_attribute(name: str, given: list[Any], kwargs: Mapping[str, Any], texts: list[Any]) -> None:
    """What is looked up of every item, and what stands in for it where an item has none."""
    count = len(given[0]) if hasattr(given[0], "__len__") else 1
    named = [one for one in texts if one is not given[0] and name != "join"]
    steps = sum(1 + one.count(".") + one.count(",") for one in named if len(one) < LARGEST)
    turn(count * steps)
    if name in ("groupby", *LAZY) and "default" in kwargs:
        limit(count * measure(kwargs["default"]))
    elif name == "groupby" and len(given) > 2:
        limit(count * measure(given[2]))
    if name == "sum" and any(isinstance(one, (str, list, tuple)) for one in (*given[2:], kwargs.get("start"))):
        limit(count * measure(given[0]))  # each sum is a new list


def check_given(values: Iterable[Any]) -> None:
    """What is handed over is stored under the name of a parameter."""
    for one in values:
        kind = type(one)
        if kind in WITH_LENGTH:
            size = len(one)
            if kind is not str or size >= SMALL:
                kept(one)
            if size >= HEAVY and (row := here.row) is not None:
                clock(row)
        elif kind is int and abs(one) > LARGEST:
            raise TooMuch("it calls with a number beyond a million")


def _check_join(given: list[Any]) -> None:
    between = max((len(one) for one in given[1:] if isinstance(one, (str, bytes))), default=0)
    for one in given:
        if isinstance(one, (str, list, tuple, dict)):
            limit(len(one) * (between + 1))


def check_method(name: str, text: Any, args: tuple[Any, ...]) -> None:
    texts: list[Any] = [one for one in args if isinstance(one, (str, bytes))]
    if name == "replace" and len(texts) > 1:
        found = text.count(texts[0]) if len(texts[0]) else len(text) + 1
        limit(len(text) + found * len(texts[1]))
    elif name == "expandtabs":
        limit(
            len(text)
            + text.count("\t" if isinstance(text, str) else b"\t")
            * max([8, *(one for one in args if isinstance(one, int))])
        )
    elif name == "join":
        limit(sum(len(text) + 1 for _ in args[0]) if args and hasattr(args[0], "__len__") else 0)
    elif name == "translate":
        limit(len(text) * max(1, sum(measure(one) for one in args)))
    elif name in ("strip", "lstrip", "rstrip") and texts and len(texts[0]) > SETS:
        raise TooMuch("it strips a text of too many characters")
    elif name in BACKWARDS and texts:
        limit(len(text) * len(texts[0]) // ITEM)
    elif name in ("encode", "decode") and len(text) > SETS and any(one.lower() not in ENCODINGS for one in texts[:1]):
        raise TooMuch(f"it asks for the encoding {texts[0][:40]!r} of a long text")
    elif name in ("format", "format_map"):
        check_format(text, args)


def check_format(text: str, values: tuple[Any, ...]) -> None:
    if WIDTHS.search(text):
        raise TooMuch("it formats with too large a width")
    numbers = NUMBERS.findall(text)
    if any(len(one) > 7 for one in numbers):
        raise TooMuch("it formats with too large a width")
    fields = text.count("%") + text.count("{")
    limit(len(text) + sum(map(int, numbers)) + fields * max((measure(one) for one in values), default=0))


def check_bits(bits: int) -> None:
    if bits > BITS and here.row is not None:
        raise TooMuch("it computes with too large a number")
