"""Documents with any value at any place exchanged for any other: what a reader of one must take or refuse, and nothing else."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.integers() | st.sampled_from([2**63, -(2**70), 10**400, 10**18]) | st.floats()
TEXTS = st.text(max_size=6) | st.sampled_from(["\ud800", "\x1b[2J", "../../x", "<script>", "x" * 300])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
BYTES = st.sampled_from(
    [
        b"",
        b"\xff\xfe{}",
        b"{",
        b"nul",
        b'{"a": 1e999}',
        b'"\\ud800"',
        b"[" * 100_000,
        b'{"a":' * 30_000,
        b"9" * 5000,
        b"\0" * 64,
    ]
) | st.binary(max_size=40)


def places(body: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path into a document, the empty one first."""
    pairs = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    return [above, *(path for key, one in pairs for path in places(one, (*above, key)))]


def exchanged(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with ``value`` at ``path``."""
    if not path:
        return value
    copy = json.loads(json.dumps(body))
    at = copy
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return copy


@st.composite
def odd_documents(draw: st.DrawFn, body: Any) -> bytes:
    """The document as bytes: one value exchanged or gone, or cut, or other bytes altogether."""
    how = draw(st.sampled_from(["exchanged"] * 6 + ["gone", "cut", "bytes"]))
    paths = places(body)
    if how == "bytes":
        return draw(BYTES)
    if how == "cut":
        text = json.dumps(body).encode()
        return text[: draw(st.integers(0, len(text)))]
    path = draw(st.sampled_from(paths))
    if how == "gone" and path and isinstance(path[-1], str):
        copy = json.loads(json.dumps(body))
        at = copy
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]
        return json.dumps(copy).encode()
    return json.dumps(exchanged(body, path, draw(VALUES))).encode()
