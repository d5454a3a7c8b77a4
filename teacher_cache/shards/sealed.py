"""JSON documents that carry their own checksum: manifest, ``field.json`` and commits. A flipped bit anywhere in one is noticed.

The checksum guards against damage, not against people: whoever edits a document can make a new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from teacher_cache.errors import CacheError

SEAL = "sha256"
END = b"}\n"
"""The one byte that JSON could do without is looked for, too: a file that is cut is never taken for whole."""
MOST_VALUES = 1 << 23
"""Of a document: a few bytes of text become some hundred in memory. The groups of 300 million rows are half as many."""


def seal(body: Mapping[str, Any]) -> bytes:
    """Deterministic UTF-8 JSON of ``body`` plus ``sha256`` over its canonical form."""
    sealed = {**body, SEAL: _digest(body)}
    return (json.dumps(sealed, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def unseal(data: bytes, place: str) -> dict[str, Any]:
    """The body of ``seal``; CacheError naming ``place`` where it is no JSON object or does not have its own checksum."""
    try:
        if (values := data.count(b",") + data.count(b"[") + data.count(b"{")) > MOST_VALUES:
            raise ValueError(f"{values:,} values, at most {MOST_VALUES:,} are read")
        body = json.loads(data, object_pairs_hook=_each_once)
        if not isinstance(body, dict):
            raise ValueError("not a JSON object")
        if not data.endswith(END):
            raise ValueError("its last byte is missing")
        if body.pop(SEAL, None) != _digest(body):
            raise ValueError("its content does not have its checksum")
    except (ValueError, TypeError, RecursionError) as error:
        raise CacheError(
            f"{place}: damaged or edited ({error}): restore it; `kdcli cache verify` lists all damage"
        ) from None
    return body


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; ValueError where a key stands in it twice, of which every reader takes another one."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
