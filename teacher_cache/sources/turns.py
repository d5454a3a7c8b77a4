"""The turns of a row as tools write them: ``{from, value}`` or ``{role, content}``, text or parts, roles by many names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from teacher_cache.errors import SkipSample
from teacher_cache.records import Turn
from teacher_cache.sources import row_limits as limits
from teacher_cache.sources.image_refs import ImageRef, part_ref
from teacher_cache.sources.row_values import checked_text, kind_of
from teacher_cache.sources.usable_samples import PLACEHOLDER

ROLE_OF = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "model", "chatgpt"), "assistant"),
    "system": "system",
}
"""What the speaker of a turn is called, in lower case → the role."""

Pieces = list[str | None]
"""Of one turn: texts, and None for an image."""


@dataclass(frozen=True)
class RawTurns:
    """(role, pieces) of every turn, of every image part what it names, and keys that nothing reads."""

    pieces: list[tuple[str, Pieces]] = field(default_factory=list)
    named: list[ImageRef | None] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def joined(self) -> tuple[Turn, ...]:
        return tuple(Turn(role, joined(pieces)) for role, pieces in self.pieces)

    def placeholders(self) -> int:
        """``<image>`` that the texts hold literally."""
        return sum(text.count(PLACEHOLDER) for _, pieces in self.pieces for text in pieces if text is not None)


def read_turns(messages: Sequence[Any], is_chat: bool) -> RawTurns:
    """
    Args:
        is_chat: ``role`` and ``content`` come before ``from`` and ``value`` where a turn has both.

    Raises:
        SkipSample: bad_row, tools_unsupported, media_unsupported, not_for_training, image_missing.
    """
    raw = RawTurns()
    word, by, text = ("message", ("role", "from"), ("content", "value")) if is_chat else _LLAVA
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise SkipSample("bad_row", f"{word} {number} is {kind_of(message)}, not an object")
        speaker, key = message.get(by[0]), text[0]
        speaker = message.get(by[1]) if speaker is None else speaker
        role = ROLE_OF.get(speaker) if isinstance(speaker, str) else None
        if role is None or len(message) > 2:
            role = _checked_role(message, speaker, f"{word} {number}")
            raw.unused.extend(limits.unused_of_turn(message))
        said = message.get(key)
        if said is None and text[1] in message:
            said, key = message[text[1]], text[1]
        is_plain = isinstance(said, str) and said.isascii()
        raw.pieces.append((role, [said] if is_plain else _pieces(said, f"{key!r} of {word} {number}", raw.named)))
    return raw


_LLAVA = ("turn", ("from", "role"), ("value", "content"))


def _checked_role(turn: Mapping[str, Any], speaker: Any, what: str) -> str:
    """Of a turn that has more than a speaker and a text, or an unusual speaker."""
    limits.refuse_tools(turn, speaker, what)
    role = ROLE_OF.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise SkipSample("bad_row", f"{what} is by {str(speaker)[:40]!r}, not one of {', '.join(ROLE_OF)}")
    if role == "assistant":
        limits.refuse_unlabelled_answer(turn, what)
    return role


def _pieces(content: Any, what: str, found: list[ImageRef | None]) -> Pieces:
    if not isinstance(content, list):
        return [checked_text(content, what)]
    pieces: Pieces = []
    for part in content:
        if isinstance(part, str):
            pieces.append(checked_text(part, what))
            continue
        if not isinstance(part, Mapping):
            raise SkipSample("bad_row", f"{what} holds a part that is {type(part).__name__}, not an object")
        kind = part.get("type")
        if kind is None:  # Qwen-VL writes {"image": …} and {"text": …}
            names = ("image", "image_url", "text", *limits.media_columns(part))
            kind = next((name for name in names if part.get(name) is not None), None)
        if kind in ("text", "input_text", "output_text"):
            pieces.append(checked_text(part.get("text"), f"'text' in {what}"))
        elif kind in ("image", "image_url", "input_image"):
            pieces.append(None)
            found.append(part_ref(part, f"an image in {what}"))
        else:
            limits.refuse_part(kind, what)
    return pieces


def joined(pieces: Sequence[str | None]) -> str:
    """As LLaVA writes it: an image on a line of its own, texts one right behind the other."""
    if len(pieces) == 1 and pieces[0] is not None:
        return pieces[0]
    text = ""
    for number, piece in enumerate(pieces):
        if number and (piece is None or pieces[number - 1] is None) and piece != "":
            text += "\n"
        text += PLACEHOLDER if piece is None else piece
    return text
