"""What a JSON document must look like before anybody works with it: a checksum says that it is whole, not that it makes sense.

A kind is a type; ``COUNT``; a tuple (one of these kinds); a list of one kind (a list of such values); a dictionary (an object with
these keys, others besides; ``name?``: the key may be absent; ``...``: every key). Numbers are finite, and true is no number.
"""

from __future__ import annotations

import math
from typing import Any

from teacher_cache.errors import CacheError

COUNT = "a whole number from 0"
MOST = 1 << 62
"""Whole numbers beyond fit neither a file's offset nor a tensor's shape."""
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "an object",
    list: "a list",
    bool: "true or false",
}


def require(value: Any, kind: Any, place: str) -> Any:
    """``value``, where it is of the kind; CacheError naming ``place`` and the key that is not."""
    if wrong := misfit(value, kind):
        raise CacheError(f"{place}: {wrong}: it was not written by kdcli, or is damaged")
    return value


def misfit(value: Any, kind: Any, name: str = "it") -> str:
    """Where ``value`` is not of a kind, in words; "" where it is."""
    if kind is str:
        return "" if type(value) is str and _is_utf8(value) else f"{name} must be text"
    if kind is COUNT or kind is int:
        good = type(value) is int and (0 if kind is COUNT else -MOST) <= value < MOST
        return "" if good else f"{name} must be {COUNT if kind is COUNT else _WORDS[int]}"
    if isinstance(kind, tuple):
        found = [misfit(value, one, name) for one in kind]
        return "" if "" in found else found[0]
    if isinstance(kind, list):
        if type(value) is not list:
            return f"{name} must be a list"
        # Names are put together for what does not fit only: every row of a cache comes through here.
        return next((misfit(one, kind[0], f"{name}[{i}]") for i, one in enumerate(value) if misfit(one, kind[0])), "")
    if isinstance(kind, dict):
        return _misfit_of_object(value, kind, name)
    if kind is None:
        return "" if value is None else f"{name} must be null"
    if kind is float:
        good = (type(value) is int and abs(value) < MOST) or (type(value) is float and math.isfinite(value))
        return "" if good else f"{name} must be a finite number"
    return "" if type(value) is kind else f"{name} must be {_WORDS[kind]}"


def _misfit_of_object(value: Any, kind: dict[Any, Any], name: str) -> str:
    if type(value) is not dict:
        return f"{name} must be an object"
    if ... in kind:
        every = (misfit(one, kind[...], f"{name}.{str(key)[:40]}") for key, one in value.items())
        return next(filter(None, every), "")
    for key, inner in kind.items():
        plain = key.removesuffix("?")
        if misfit(value[plain], inner) if plain in value else plain == key:
            inside = plain if name == "it" else f"{name}.{plain}"
            return misfit(value[plain], inner, inside) if plain in value else f"{inside} is missing"
    return ""


def _is_utf8(text: str) -> bool:
    """Not half of a surrogate pair, which JSON can write and nothing can store."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
