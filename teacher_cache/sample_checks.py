"""What was decoded of a row, held against what the cache says of itself: nothing of a wrong shape, or beyond the vocabulary, gets into
a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from teacher_cache.errors import CacheError
from teacher_cache.records import ImageLayout, Sampled, TextTokens, TopK

WIDE = ("vision_hidden", "response_hidden", "vision_features")
"""Fields of rows as wide as the teacher's hidden states."""
DIMENSIONS = {"affinity": 2, "relation": 2, "attention": 3, **dict.fromkeys(WIDE, 2)}
"""Of what fields decode to; one that is not here is somebody's own, and may give anything."""


def check_shapes(
    fields: Mapping[str, Any], text: TextTokens, layout: Sequence[ImageLayout], place: Callable[[str], str]
) -> None:
    """CacheError where a field has not as many rows as the sample has tokens to which they belong. place: of a field's record."""
    vision, response = sum(one.tokens() for one in layout), int(torch.count_nonzero(text.response))
    tokens = len(text.ids)
    pairs = {"affinity": (vision, tokens), "attention": (tokens, vision), "relation": (vision, vision)}
    for name, decoded in fields.items():
        found: tuple[int, ...] = tuple(decoded.shape[-2:]) if name in pairs else (len(decoded),)
        wanted = pairs.get(name, (response if name.startswith("response") else vision,))
        if found != wanted:
            raise CacheError(f"{place(name)}: rows {found} where the sample has {wanted}: run `kdcli cache verify`")


def check_numbers(
    fields: Mapping[str, Any], described: Mapping[str, Mapping[str, Any]], place: Callable[[str], str]
) -> None:
    """CacheError where a field's rows are not as wide as the teacher's, or name a token that it has not.

    Args:
        described: ``field.json`` by field. place: of a field's record.
    """
    for name, decoded in fields.items():
        body = described[name]
        if wrong := _misfit(name, decoded, body["params"], body["teacher"]):
            raise CacheError(f"{place(name)}: {wrong}: run `kdcli cache verify`")


def _misfit(name: str, decoded: Any, params: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    """What is wrong, in words; "" where nothing is. A teacher that is not described (``{}``) says nothing."""
    vocabulary = vocabulary_of(teacher)
    if isinstance(decoded, torch.Tensor):
        if decoded.ndim != DIMENSIONS.get(name, decoded.ndim):
            return f"{decoded.ndim} dimensions"
        width = teacher.get("hidden_size")
        wrong = name in WIDE and width is not None and decoded.shape[1] != width
        return f"rows {decoded.shape[1]} wide, the teacher's are {width}" if wrong else ""
    if not isinstance(decoded, TopK | Sampled):
        return ""
    shapes = {tuple(one.shape) for one in vars(decoded).values()}
    if len({shape[0] for shape in shapes if shape}) != 1 or len({shape for shape in shapes if len(shape) != 1}) != 1:
        return f"columns of shapes {sorted(shapes)}"
    if decoded.ids.numel() and vocabulary is not None:
        if not 0 <= int(decoded.ids.min()) <= int(decoded.ids.max()) < vocabulary:
            return f"a token beyond the {vocabulary} of the teacher"
        if isinstance(decoded, TopK) and decoded.ids.shape[1] != min(params.get("k", vocabulary), vocabulary):
            return f"{decoded.ids.shape[1]} entries per row, not {params.get('k')}"
    return ""


def vocabulary_of(teacher: Mapping[str, Any]) -> int | None:
    """Tokens that a teacher has, without padding rows of its head; None where it is not described."""
    return min(teacher["head_width"], teacher["tokenizer"]["length"]) if teacher else None


def check_head(weight: torch.Tensor, teacher: Mapping[str, Any], width: int | None, place: str) -> None:
    """CacheError where a head ``[V, D]`` lacks a token of the teacher's, or is not as wide as the rows that it is multiplied with."""
    vocabulary = vocabulary_of(teacher) or 0
    if len(weight) < vocabulary or (width is not None and weight.shape[1] != width):
        raise CacheError(
            f"{place} is {len(weight)} × {weight.shape[1]}, for {vocabulary} tokens and rows {width} wide: run `kdcli cache verify`"
        )
