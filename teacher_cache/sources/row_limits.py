"""What a row asks for that a sample cannot hold: skipped where the sample would be another row, noted where it is only poorer.

- **Video and audio**, as a column, a part or a placeholder: the row is skipped. ``<video>`` in a question stands for a video unless the
  question speaks of the tag: in quotes, before "tag", "element" or "component", or with ``</video>`` somewhere.
- **Other tools' image placeholders** (``<image_1>``, ``<|image|>``, ``<IMAGE>``) in a row that places no image by ``<image>`` or by parts:
  skipped, since tools count their images differently.
- **Answers that are no labels** (``weight: 0``, ``train: false``, ``masked: true``, of the row or of one answer): the row is skipped,
  since every answer of a sample is a label.
- **Tools**: a row in which one is called or answers is skipped.
- **Columns and keys that change training elsewhere** and are not used here: a note of the row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from teacher_cache.errors import SkipSample
from teacher_cache.records import Turn
from teacher_cache.sources.row_values import is_given

UNUSED = frozenset(
    {
        *("tools", "functions", "documents", "chat_template_kwargs", "history", "objects", "loss_mask"),
        *("reasoning_content", "reasoning", "thinking", "chosen", "rejected", "rejected_response", "rejected_messages"),
        *("system_prompt", "system_message"),
    }
)
"""Columns of a row that other trainers read. What else is nested is metadata."""

_WEIGHTS = (
    "weight",
    "loss_weight",
    "loss_scale",
    "sample_weight",
    "loss",
    "train",
    "training",
    "trainable",
    "loss_mask",
    "calculate_loss",
)
_MASKS = ("masked", "mask")
_ROW_NUMBERS = ("weight", "loss_weight", "sample_weight")
"""Of a whole row; ``loss`` or ``mask`` as a number is somebody's measurement there."""
_TURN_KEYS = frozenset({"from", "role", "value", "content", *_WEIGHTS, *_MASKS})
_TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
_TOOL_ROLES = frozenset(
    {
        *("tool", "tools", "tool_call", "tool_calls", "tool_use", "tool_response", "tool_result", "observation"),
        *("function", "function_call", "function_response", "function_result", "ipython"),
    }
)

_MEDIA_COLUMN = re.compile(r"(?:video|audio)s?(?:_(?:path|file|url|bytes)s?)?", re.IGNORECASE)
_MEDIA_PART = re.compile(r"(?:input_)?(?:video|audio)(?:_url)?", re.IGNORECASE)
_MEDIA = ("video", "audio", "speech", "sound")
_PLACE = re.compile(
    r"<img>[^<\n]+</img>|(?!(?-i:<image>))<(?P<left>\|?)(?P<word>image|img|picture|video|audio|speech|sound)"
    r"(?P<more>(?:[ _-]?(?:\d+|here|pad|placeholder|token|soft_token|context|start|bos))?\|?)>"
    r"|<start_of_(?P<start>image|audio)>|<\|vision_(?:start|pad)\|>|(?-i:\[(?P<upper>IMG|IMAGE|VIDEO|AUDIO)\])",
    re.IGNORECASE,
)
_QUOTES = tuple("\"'`“‘«")
_SPEAKS_OF = re.compile(r"[\"'`”’»]|\W{0,2}(?:html\W)?(?:tag|element|component)", re.IGNORECASE)


def media_columns(names: Iterable[Any]) -> list[str]:
    """Those of a row's columns that hold a video or a sound."""
    return [name for name in names if isinstance(name, str) and name[:1] in "vVaA" and _MEDIA_COLUMN.fullmatch(name)]


def refuse_media_columns(row: Mapping[str, Any]) -> None:
    """SkipSample where one of them is given."""
    for name in media_columns(row):
        value = row[name]
        if isinstance(value, str | bytes | list | Mapping) and is_given(value):
            shown = f": {value[:60]!r}" if isinstance(value, str) else ""
            raise SkipSample("media_unsupported", f"the row has {name!r}{shown}")


def refuse_part(kind: Any, what: str) -> None:
    """SkipSample for a part that is neither text nor image."""
    shown = str(kind)[:40]
    holds = f"{what} holds a part of type {shown!r}"
    if _MEDIA_PART.fullmatch(shown):
        raise SkipSample("media_unsupported", holds)
    if shown.lower() in _TOOL_ROLES:
        raise SkipSample("tools_unsupported", holds)
    raise SkipSample("bad_row", f"{holds}, which is neither text nor image")


def refuse_placeholders(turns: Sequence[Turn], images: int, placed: bool) -> None:
    """SkipSample where a question has a place for a video, a sound, or an image of another tool's counting.

    Args:
        images: how many the row has. placed: ``<image>`` or parts say where they stand; other names of images are words then.
    """
    for number, turn in enumerate(turns):
        if turn.role != "user" or ("<" not in turn.text and "[" not in turn.text):
            continue
        for found in _PLACE.finditer(turn.text):
            word = (found["word"] or found["start"] or found["upper"] or "image").lower()
            if _is_html(turn.text, found, images):
                continue
            holds = f"turn {number} holds {found.group()[:40]!r}"
            if word in _MEDIA:
                raise SkipSample("media_unsupported", holds)
            if not placed:
                what = f"{holds}, and the row has {images} images: write <image> for each of them, in their order"
                raise SkipSample("placeholder_mismatch", what)


def _is_html(text: str, found: re.Match[str], images: int) -> bool:
    """True where the text speaks of a tag; only a bare ``<word>`` can be one."""
    if found["word"] is None or found["left"] or found["more"]:
        return False
    word = found["word"].lower()
    if word in ("img", "picture") and not images:
        return True
    quoted = text[: found.start()].endswith(_QUOTES) or _SPEAKS_OF.match(text, found.end())
    return bool(quoted) or f"</{word}" in text.lower()


def refuse_unlabelled_row(row: Mapping[str, Any]) -> None:
    """SkipSample where the whole row is not to be trained on."""
    said = {name: value for name, value in row.items() if name in _ROW_NUMBERS or isinstance(value, bool)}
    if name := _no_label(said):
        raise SkipSample("not_for_training", f"the row says {name!r}: {row[name]!r}")


def refuse_unlabelled_answer(answer: Mapping[str, Any], what: str) -> None:
    """SkipSample where an answer is not to be trained on."""
    if len(answer) > 2 and (name := _no_label(answer)):
        raise SkipSample("not_for_training", f"{what} says {name!r}: {answer[name]!r}")


def _no_label(said: Mapping[str, Any]) -> str:
    """The key that says so; empty: none does."""
    if off := [name for name in _WEIGHTS if name in said and _is_off(said[name])]:
        return off[0]
    return next((name for name in _MASKS if said.get(name) in (True, 1)), "")


def _is_off(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("0", "0.0", "false")
    return isinstance(value, bool | int | float) and value <= 0


def _is_plain(value: Any) -> bool:
    """A weight that changes nothing."""
    return value is None or (isinstance(value, bool | int | float) and value == 1)


def refuse_tools(turn: Mapping[str, Any], role: Any, what: str) -> None:
    """SkipSample where a turn calls a tool or is a tool's answer."""
    if isinstance(role, str) and role.strip().lower() in _TOOL_ROLES:
        raise SkipSample("tools_unsupported", f"{what} is by {role[:40]!r}")
    for name in _TOOL_KEYS:
        if is_given(turn.get(name)):
            raise SkipSample("tools_unsupported", f"{what} has {name!r}")


def unused_of_row(row: Mapping[str, Any]) -> Iterator[str]:
    """Columns that change training elsewhere and are given here."""
    for name, value in row.items():
        if (name in UNUSED and is_given(value)) or (name in _ROW_NUMBERS and not _is_plain(value)):
            yield repr(name)


def unused_of_turn(turn: Mapping[str, Any]) -> Iterator[str]:
    """Keys of a turn that nothing reads, and weights that are not used."""
    if len(turn) == 2:
        return
    for name, value in turn.items():
        if name in _WEIGHTS:
            used = _is_plain(value) or _is_off(value)
        else:
            used = name in _TURN_KEYS or (value is not False and not is_given(value))
        if not used:
            yield f"{str(name)[:40]!r} of a turn"
