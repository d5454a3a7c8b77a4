"""A row as Python values, of any format → a sample: turns with placeholders, images, extra columns. One place for all formats.

- **Turns** are ``messages``, else ``conversations``, else ``prompt`` and ``completion``; of a turn ``from`` or ``role``, ``value`` or
  ``content`` (text, or a list of parts). Role names are those of ``ROLE_OF``, in any case. A column ``system`` is the system turn of a
  row that has none.
- **Images** are the parts ``{"type": "image"}`` and the columns ``image`` and ``images``.

Where an image stands in the text:

1. Parts ``{"type": "image"}`` say so themselves. One that names no file takes the next of the row's ``image`` / ``images``. Beside such
   parts a literal ``<image>`` in a text is ambiguous: the row is skipped.
2. Without such parts, every ``<image>`` in the text is one of ``image`` / ``images``, in order.
3. Without either, all of ``image`` / ``images`` stand before the first user turn, as TRL places them (not in ``conversations`` of ``from``
   and ``value``, where LLaVA wants placeholders).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from teacher_cache.errors import SkipRow
from teacher_cache.records import Image, Sample, SkipRecord, Turn
from teacher_cache.rows import PLACEHOLDER
from teacher_cache.sources import row_limits as limits
from teacher_cache.sources.image_refs import IMAGE_COLUMNS, ImageRef, listed_refs, part_ref
from teacher_cache.sources.row_values import checked_text, extra_of, is_given, kind_of, row_object, source_id_of

ROLE_OF = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "model", "chatgpt"), "assistant"),
    "system": "system",
}
"""What the speaker of a turn is called, in lower case → the role."""
TALK = ("messages", "conversations", "prompt", "completion")
COLUMNS = frozenset({"id", "system", "messages", "conversations", *IMAGE_COLUMNS})
"""What is read of a row whatever else it has; ``prompt`` and ``completion`` may be metadata of another conversation."""


@dataclass(frozen=True)
class Row:
    """What a row says: turns with one ``<image>`` an image, the images in that order, further columns, notes (``Sample.notes``)."""

    turns: tuple[Turn, ...]
    refs: tuple[ImageRef, ...]
    extra: dict[str, Any]
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def characters(self) -> int:
        return sum(len(turn.text) for turn in self.turns)


def read_sample(
    empty: Sample, value: Any, parse: Callable[[Any], Row], fetch: Callable[[ImageRef], Image]
) -> Sample | SkipRecord:
    """The row ``value`` as a sample, or the reason why it is none.

    Args:
        empty: part, ordinal, place, and the id of a row that names none. parse: ``read_row``, or the format's own. fetch: an image's bytes.
    """
    source_id = empty.source_id
    try:
        source_id = source_id_of(value.get("id") if isinstance(value, Mapping) else None) or source_id
        row = parse(value)
        images = tuple(map(fetch, row.refs))
    except SkipRow as skip:
        return SkipRecord(empty.part, empty.ordinal, source_id, empty.place, skip.reason, skip.detail)
    return Sample(empty.part, empty.ordinal, source_id, empty.place, row.turns, images, row.extra, row.notes)


def read_row(value: Any, members: Sequence[str] | None = None) -> Row:
    """
    Args:
        members: the image files that travel with the row (a WebDataset sample), in order: they are the row's images. Where the row names
            some of them by file name, those in its order; names of files elsewhere mean nothing then. None: the row's own columns.

    Raises:
        SkipRow: bad_row, media_unsupported, tools_unsupported, not_for_training, placeholder_mismatch, image_missing (an address in the
            web, or a name where there are no members).
    """
    row = row_object(value)
    limits.refuse_media_columns(row)
    limits.refuse_unlabelled_row(row)
    listed = listed_refs(row)
    if members is not None:
        listed = _among(listed, members) or [ImageRef(name) for name in members]
    messages, may_place, talk = _messages(row)
    read = _read_turns(messages, may_place)
    pieces, named = read.turns, read.named
    if members is not None and named:
        named, listed = _named_members(named, listed, members)
    literal = sum(text.count(PLACEHOLDER) for _, one in pieces for text in one if text is not None)
    if named and literal:
        raise SkipRow("placeholder_mismatch", f"the text holds {literal} {PLACEHOLDER} beside {len(named)} image parts")
    turns = tuple(Turn(role, _joined(one)) for role, one in pieces)
    limits.refuse_placeholders(turns, len(listed), bool(named or literal))
    if named:
        listed = _filled(named, listed)
    elif listed and not literal and may_place:
        turns = tuple(Turn(role, _joined(one)) for role, one in _before_first_question(pieces, len(listed)))
    turns = _with_system(turns, row.get("system"))
    unused = dict.fromkeys([*limits.unused_of_row(row), *read.unused])
    notes = [("columns_unused", ", ".join(unused))] if unused else []
    notes += [
        ("image_in_answer", f"turn {i}") for i, t in enumerate(turns) if t.role == "assistant" and PLACEHOLDER in t.text
    ]
    return Row(turns, tuple(listed), extra_of(row, COLUMNS | talk), tuple(notes))


def _messages(row: Mapping[str, Any]) -> tuple[Sequence[Any], bool, frozenset[str]]:
    """(the row's messages, whether images without a placeholder stand before the first question, further columns that were read)."""
    prompt, completion = row.get("prompt"), row.get("completion")
    there = [name for name in TALK[:2] if row.get(name) is not None]
    # Of an empty list only where nothing else is there: mixtures joined from two have both columns, one of them empty.
    found = [name for name in there if row[name] != []] or ([] if is_given(completion) else there[:1])
    if found:
        talk = [_list(row[name], repr(name)) for name in found]
        if len(found) == 2 and not _equal(*talk):
            raise SkipRow("bad_row", "'messages' and 'conversations' are both there and differ: keep one of them")
        first = talk[0][0] if talk[0] else None
        is_llava = found[0] == "conversations" and not (isinstance(first, Mapping) and "from" not in first)
        return talk[0], not is_llava, frozenset()
    if prompt is None and completion is None:
        columns = ", ".join(repr(str(name)[:40]) for name in list(row)[:12])
        raise SkipRow(
            "bad_row",
            f"the row has neither 'messages' nor 'conversations' nor 'prompt' and 'completion'; it has {columns or 'nothing'}",
        )
    if completion is None and is_given(row.get("chosen")):
        raise SkipRow("bad_row", "a preference pair ('chosen', 'rejected'): write the answer to learn as 'completion'")
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _list(prompt, "'prompt'")
    said = completion
    said = [{"role": "assistant", "content": said}] if isinstance(said, str) else _list(said, "'completion'")
    return [*asked, *said], True, frozenset(TALK[2:])


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except RecursionError:
        return False


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise SkipRow("bad_row", f"{what} is {kind_of(value)}, not a list of messages")
    return value


_LLAVA = ("turn", ("from", "role"), ("value", "content"))
Pieces = list[str | None]
"""Of one message: texts, and None for an image."""


@dataclass(frozen=True)
class _Turns:
    """(role, pieces) of every message, of every image part what it names, and keys that nothing reads."""

    turns: list[tuple[str, Pieces]]
    named: list[ImageRef | None]
    unused: list[str]


def _read_turns(messages: Sequence[Any], is_chat: bool) -> _Turns:
    read = _Turns([], [], [])
    word, by, text = ("message", ("role", "from"), ("content", "value")) if is_chat else _LLAVA
    for number, message in enumerate(messages):
        what = f"{word} {number}"
        if not isinstance(message, Mapping):
            raise SkipRow("bad_row", f"{what} is {kind_of(message)}, not an object")
        speaker = next((message[key] for key in by if message.get(key) is not None), None)
        limits.refuse_tools(message, speaker, what)
        role = ROLE_OF.get(speaker.strip().lower()) if isinstance(speaker, str) else None
        if role is None:
            raise SkipRow("bad_row", f"{what} is by {str(speaker)[:40]!r}, not one of {', '.join(ROLE_OF)}")
        if role == "assistant":
            limits.refuse_unlabelled_answer(message, what)
        key = next(
            (key for key in text if message.get(key) is not None), text[text[0] not in message and text[1] in message]
        )
        read.turns.append((role, _pieces(message.get(key), f"{key!r} of {what}", read.named)))
        read.unused.extend(limits.unused_of_turn(message))
    return read


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


def _with_system(turns: tuple[Turn, ...], system: Any) -> tuple[Turn, ...]:
    if not is_given(system) or (isinstance(system, str) and not system.strip()):
        return turns
    text = checked_text(system, "'system'")
    first = turns[0] if turns else None
    if first is None or first.role != "system":
        return (Turn("system", text), *turns)
    if first.text.strip() != text.strip():
        raise SkipRow("bad_row", "the row has a system turn, and another text in 'system': keep one of them")
    return turns


def _among(refs: Sequence[ImageRef], members: Sequence[str]) -> list[ImageRef]:
    """``refs`` as the members of the same file name; empty where one of them is none."""
    by_name = {os.path.basename(name): ImageRef(name) for name in members}
    if refs and not members and any(ref.inline is None for ref in refs):
        raise SkipRow("image_missing", f"the row names {refs[0].name[:80]!r}, and no image travels with it")
    found = [ref if ref.inline is not None else by_name.get(os.path.basename(ref.name)) for ref in refs]
    return [ref for ref in found if ref is not None] if None not in found else []


def _named_members(
    named: list[ImageRef | None], listed: list[ImageRef], members: Sequence[str]
) -> tuple[list[ImageRef | None], list[ImageRef]]:
    """What image parts name, among the files that travel with the row; and the images that are left beside the text."""
    found = _among([ref for ref in named if ref is not None], members)
    if not found:
        return [ref if ref is not None and ref.inline is not None else None for ref in named], listed
    waiting = iter(found)
    named = [None if ref is None else next(waiting) for ref in named]
    return named, listed if None in named else []


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
