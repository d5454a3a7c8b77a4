"""A row of chat messages as Python values (TRL, Qwen, OpenAI style) → turns with placeholders, and where its images are.

Where an image stands in the text:

1. Parts ``{"type": "image"}`` say so themselves. One that names no file takes the next of the row's ``image`` / ``images``. Beside such
   parts a literal ``<image>`` in a text is ambiguous: the row is skipped.
2. Without such parts, every ``<image>`` in the text is one of ``image`` / ``images``, in order.
3. Without either, all of ``image`` / ``images`` stand before the first user turn, as TRL places them (not in ``conversations``, where
   LLaVA wants placeholders).
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from teacher_cache.errors import SkipRow
from teacher_cache.records import ROLES, Turn
from teacher_cache.rows import PLACEHOLDER
from teacher_cache.sources.llava_rows import ROLE_OF, checked_text, turns_of

COLUMNS = frozenset({"messages", "conversations", "prompt", "completion", "image", "images"})

_DATA_URI = re.compile(r"data:(?:image/([\w.+-]+))?[^,]*;base64,", re.IGNORECASE)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_NOT_TEXT = ("video", "audio", "input_audio", "video_url")


@dataclass(frozen=True)
class ImageRef:
    """Where an image is: a path below the image root, or its own bytes as base64 text (``inline``)."""

    name: str
    inline: str | None = None

    def decode(self) -> bytes:
        """The bytes that the row itself holds; SkipRow where they are no base64 or empty."""
        assert self.inline is not None
        try:
            data = base64.b64decode(self.inline, validate=True)
        except (binascii.Error, ValueError) as error:
            raise SkipRow("image_corrupt", f"{self.name!r}: its base64 text is damaged ({error})") from error
        if not data:
            raise SkipRow("image_missing", f"{self.name!r} has no bytes")
        return data


def rows_turns(
    row: Mapping[str, Any], members: Sequence[str] | None = None
) -> tuple[tuple[Turn, ...], tuple[ImageRef, ...]]:
    """Turns with one ``<image>`` an image, and the images in that order.

    Args:
        members: the image files that travel with the row (a WebDataset sample), in order: they are the row's images. Where the row names
            some of them by file name, those in its order; names of files elsewhere mean nothing then. None: the row's own columns.

    Raises:
        SkipRow: bad_row, placeholder_mismatch, image_missing (an address in the web, or a name where there are no members).
    """
    listed = [ref for name in ("image", "images") for ref in _refs(row.get(name), repr(name))]
    if members is not None:
        listed = _among(listed, members) or [ImageRef(name) for name in members]
    messages = _messages(row)
    if messages is None:  # LLaVA's turns, one row a line
        return turns_of(row.get("conversations")), tuple(listed)
    turns, named = _turns(messages)
    if members is not None and named:
        found = _among([ref for ref in named if ref is not None], members)
        waiting = iter(found)
        if found:
            named = [None if ref is None else next(waiting) for ref in named]
        else:
            named = [ref if ref is not None and ref.inline is not None else None for ref in named]
        listed = [] if found and None not in named else listed
    literal = sum(text.count(PLACEHOLDER) for _, pieces in turns for text in pieces if text is not None)
    if named and literal:
        raise SkipRow("placeholder_mismatch", f"the text holds {literal} {PLACEHOLDER} beside {len(named)} image parts")
    if named:
        listed = _filled(named, listed)
    elif listed and not literal:
        turns = _before_first_question(turns, len(listed))
    return tuple(Turn(role, _joined(pieces)) for role, pieces in turns), tuple(listed)


def _among(refs: Sequence[ImageRef], members: Sequence[str]) -> list[ImageRef]:
    """``refs`` as the members of the same file name; empty where one of them is none."""
    by_name = {os.path.basename(name): ImageRef(name) for name in members}
    if refs and not members and any(ref.inline is None for ref in refs):
        raise SkipRow("image_missing", f"the row names {refs[0].name[:80]!r}, and no image travels with it")
    found = [ref if ref.inline is not None else by_name.get(os.path.basename(ref.name)) for ref in refs]
    return [ref for ref in found if ref is not None] if None not in found else []


Pieces = list[str | None]
"""Of one message: texts, and None for an image."""


def _turns(messages: Sequence[Any]) -> tuple[list[tuple[str, Pieces]], list[ImageRef | None]]:
    """(role, pieces) of every message, and of every image part what it names."""
    found: list[ImageRef | None] = []
    turns = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise SkipRow("bad_row", f"message {number} is {type(message).__name__}, not an object")
        role = message.get("role")
        role = ROLE_OF.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise SkipRow("bad_row", f"message {number} is by {str(role)[:40]!r}, not one of {', '.join(ROLES)}")
        turns.append((role, _pieces(message.get("content"), f"'content' of message {number}", found)))
    return turns, found


def _messages(row: Mapping[str, Any]) -> list[Any] | None:
    """The row's messages in order; None: it has LLaVA's ``conversations`` instead."""
    if row.get("messages") is not None:
        return _list(row["messages"], "'messages'")
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is not None or completion is not None:
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _list(prompt, "'prompt'")
        said = completion
        said = [{"role": "assistant", "content": said}] if isinstance(said, str) else _list(said, "'completion'")
        return [*asked, *said]
    talk = row.get("conversations")
    if talk is None:
        raise SkipRow("bad_row", "the row has neither 'messages' nor 'prompt' and 'completion' nor 'conversations'")
    if isinstance(talk, list) and talk and isinstance(talk[0], Mapping) and "role" in talk[0]:
        return talk
    return None


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        kind = "absent or null" if value is None else type(value).__name__
        raise SkipRow("bad_row", f"{what} is {kind}, not a list of messages")
    return value


def _pieces(content: Any, what: str, found: list[ImageRef | None]) -> Pieces:
    if not isinstance(content, list):
        return [checked_text(content, what)]
    pieces: Pieces = []
    for part in content:
        if isinstance(part, str):
            pieces.append(checked_text(part, what))
            continue
        if not isinstance(part, Mapping):
            raise SkipRow("bad_row", f"{what} holds a part that is {type(part).__name__}, not an object")
        kind = part.get("type")
        if kind is None:  # Qwen-VL writes {"image": …} and {"text": …}
            kind = next((name for name in ("image", "image_url", "text") if part.get(name) is not None), None)
        if kind == "text":
            pieces.append(checked_text(part.get("text"), f"'text' in {what}"))
        elif kind in ("image", "image_url"):
            pieces.append(None)
            found.append(_part_ref(part, what))
        else:
            cannot = "cannot be read" if kind in _NOT_TEXT else "is neither text nor image"
            raise SkipRow("bad_row", f"{what} holds a part of type {str(kind)[:40]!r}, which {cannot}")
    return pieces


def _part_ref(part: Mapping[str, Any], what: str) -> ImageRef | None:
    value = next((part[name] for name in ("image", "image_url", "path", "url") if part.get(name) is not None), None)
    if isinstance(value, Mapping) and value.get("url") is not None:
        value = value["url"]
    return None if value is None else _ref(value, f"an image in {what}")


def _refs(value: Any, what: str) -> list[ImageRef]:
    """Of a column: nothing, one image or a list of them."""
    if value is None or value == "":
        return []
    return [_ref(one, what) for one in (value if isinstance(value, list) else [value])]


def _ref(value: Any, what: str) -> ImageRef:
    if isinstance(value, Mapping):
        path, data = value.get("path"), value.get("bytes")
        if data is not None:
            name = "inline" if path is None else checked_text(path, f"'path' of {what}")
            return ImageRef(os.path.basename(name), checked_text(data, f"'bytes' of {what}"))
        value = path
    name = checked_text(value, what)
    if inline := _DATA_URI.match(name):
        return ImageRef(f"inline.{(inline[1] or 'bin').lower()}", name[inline.end() :])
    if name.lower().startswith("file://"):
        return ImageRef(name[len("file://") :])
    if (scheme := _SCHEME.match(name)) and (name.startswith(f"{scheme[1]}://") or scheme[1].lower() == "data"):
        raise SkipRow(
            "image_missing",
            f"{name[:80]!r} is an address, and rows cannot name what is fetched: download it and write its path below the image root",
        )
    return ImageRef(name)


def _filled(named: list[ImageRef | None], listed: list[ImageRef]) -> list[ImageRef]:
    """Image parts without a file of their own take the row's images in order."""
    open_parts = named.count(None)
    if open_parts != len(listed):
        raise SkipRow(
            "placeholder_mismatch", f"{open_parts} image parts without a file, {len(listed)} images beside the text"
        )
    waiting = iter(listed)
    return [ref if ref is not None else next(waiting) for ref in named]


def _before_first_question(turns: list[tuple[str, Pieces]], images: int) -> list[tuple[str, Pieces]]:
    first = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise SkipRow("placeholder_mismatch", f"{images} images, and no user turn that they could stand in")
    role, pieces = turns[first]
    whole: Pieces = [*[None] * images, *pieces]
    return [*turns[:first], (role, whole), *turns[first + 1 :]]


def _joined(pieces: Sequence[str | None]) -> str:
    """As LLaVA writes it: an image on a line of its own, texts one right behind the other."""
    text = ""
    for number, piece in enumerate(pieces):
        if number and (piece is None or pieces[number - 1] is None) and piece != "":
            text += "\n"
        text += PLACEHOLDER if piece is None else piece
    return text
