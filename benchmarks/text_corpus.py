"""English that any machine has: Python's own documentation and what the installed packages say of themselves."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable

import torch

SHORTEST, FROM_A_TEXT = 2000, 3


def english_texts() -> list[str]:
    """Python's own documentation and the descriptions of the installed packages, from ``SHORTEST`` characters on, in an order that only
    their contents decide."""
    from pydoc_data.topics import topics

    described = [one.metadata.get_payload() for one in importlib.metadata.distributions()]  # type: ignore[attr-defined]
    long = {
        one for one in (*map(str.strip, topics.values()), *described) if isinstance(one, str) and len(one) > SHORTEST
    }
    return sorted(long, key=lambda one: hashlib.sha256(one.encode()).digest())


def english_pieces(encode_text: Callable[[str], list[int]], length: int, count: int) -> list[torch.Tensor]:
    """The first ``count`` pieces, int64 ``[length]`` each, at most ``FROM_A_TEXT`` from the beginning of each text."""
    found: list[torch.Tensor] = []
    for text in english_texts():
        pieces = torch.tensor(encode_text(text), dtype=torch.int64).split(length)
        found += [one for one in pieces if len(one) == length][:FROM_A_TEXT]
        if len(found) >= count:
            return found[:count]
    raise ValueError(f"documentation here gives {len(found)} pieces of {length} tokens, not {count}")
