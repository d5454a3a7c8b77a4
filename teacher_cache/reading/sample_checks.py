"""What was decoded of a row, held against what the cache says of itself: nothing of a wrong shape, or beyond the vocabulary, gets into
a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from teacher_cache.errors import CacheError
from teacher_cache.records import ImageLayout, TextTokens
from teacher_cache.signal_records import Sampled, TopK

Shapes = Mapping[str, tuple[str | None, ...]]
"""Field → axes of what it decodes to (``fields.shape_of``); one that says nothing of them may give anything."""


def check_shapes(
    fields: Mapping[str, Any],
    shapes: Shapes,
    text: TextTokens,
    layout: Sequence[ImageLayout],
    place: Callable[[str], str],
) -> None:
    """CacheError where a field has not as many rows as the sample has tokens to which they belong. place: of a field's record."""
    counts = {
        "vision": sum(one.tokens() for one in layout),
        "response": int(torch.count_nonzero(text.response)),
        "text": len(text.ids),
    }
    for name, decoded in fields.items():
        of_rows = [(size, counts[axis]) for size, axis in zip(sizes(decoded), shapes[name]) if axis in counts]
        found, wanted = tuple(one for one, _ in of_rows), tuple(one for _, one in of_rows)
        if found != wanted:
            raise CacheError(f"{place(name)}: rows {found} where the sample has {wanted}: run `kdcli cache verify`")


def sizes(decoded: Any) -> tuple[int, ...]:
    """Of a tensor's axes, or the number of a record's rows."""
    return tuple(decoded.shape) if hasattr(decoded, "shape") else (len(decoded),)


def check_numbers(
    fields: Mapping[str, Any],
    shapes: Shapes,
    described: Mapping[str, Mapping[str, Any]],
    place: Callable[[str], str],
) -> None:
    """CacheError where a field's rows are not as wide as the teacher's, or name a token that it has not.

    Args:
        described: ``field.json`` by field. place: of a field's record.
    """
    for name, decoded in fields.items():
        body = described[name]
        if wrong := _misfit(decoded, shapes[name], body["params"], body["teacher"]):
            raise CacheError(f"{place(name)}: {wrong}: run `kdcli cache verify`")


def _misfit(decoded: Any, shape: tuple[str | None, ...], params: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    """What is wrong, in words; "" where nothing is. A teacher that is not described (``{}``) says nothing."""
    vocabulary = vocabulary_of(teacher)
    if isinstance(decoded, torch.Tensor):
        if shape and decoded.ndim != len(shape):
            return f"{decoded.ndim} dimensions"
        width = teacher.get("hidden_size")
        wide = [size for size, axis in zip(decoded.shape, shape) if axis == "width"]
        return (
            f"rows {wide[0]} wide, the teacher's are {width}" if width is not None and wide not in ([], [width]) else ""
        )
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
