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

from teacher_cache.errors import SkipSample
from teacher_cache.records import Image, Sample, SkipRecord, Turn
from teacher_cache.sources import row_limits as limits
from teacher_cache.sources.image_refs import IMAGE_COLUMNS, ImageRef, listed_refs, refuse_other_columns
from teacher_cache.sources.row_values import checked_text, extra_of, is_given, kind_of, row_object, source_id_of
from teacher_cache.sources.turns import Pieces, RawTurns, joined, read_turns
from teacher_cache.sources.usable_samples import PLACEHOLDER

TALK = ("messages", "conversations", "prompt", "completion")
COLUMNS = frozenset({"id", "system", "messages", "conversations", *IMAGE_COLUMNS})
"""What is read of a row whatever else it has; ``prompt`` and ``completion`` may be metadata of another conversation."""


@dataclass(frozen=True)
class MessageRow:
    """What a row says: turns with one ``<image>`` an image, the images in that order, further columns, notes (``Sample.notes``)."""

    turns: tuple[Turn, ...]
    refs: tuple[ImageRef, ...]
    extra: dict[str, Any]
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def characters(self) -> int:
        return sum(len(turn.text) for turn in self.turns)


def read_sample(
    empty: Sample, value: Any, parse: Callable[[Any], MessageRow], fetch: Callable[[ImageRef], Image]
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
    except SkipSample as skip:
        return SkipRecord(empty.part, empty.ordinal, source_id, empty.place, skip.reason, skip.detail)
    return Sample(empty.part, empty.ordinal, source_id, empty.place, row.turns, images, row.extra, row.notes)


def read_row(value: Any, members: Sequence[str] | None = None) -> MessageRow:
    """
    Args:
        members: the image files that travel with the row (a WebDataset sample), in order: they are the row's images. Where the row names
            some of them by file name, those in its order; names of files elsewhere mean nothing then. None: the row's own columns.

    Raises:
        SkipSample: bad_row, media_unsupported, tools_unsupported, not_for_training, placeholder_mismatch, image_missing (an address in the
            web, or a name where there are no members).
    """
    row = row_object(value)
    limits.refuse_media_columns(row)
    limits.refuse_unlabelled_row(row)
    listed = listed_refs(row)
    if members is not None:
        listed = _among(listed, members) or [ImageRef(name) for name in members]
    first, *others = _talks(row)
    raw = read_turns(first.messages, first.is_chat)
    named, literal, turns = raw.named, raw.placeholders(), raw.joined()
    if any(read_turns(other.messages, other.is_chat).joined() != turns for other in others):
        raise SkipSample("bad_row", "'messages' and 'conversations' are both there and differ: keep one of them")
    if members is not None and named:
        named, listed = _named_members(named, listed, members)
    if named and literal:
        raise SkipSample(
            "placeholder_mismatch", f"the text holds {literal} {PLACEHOLDER} beside {len(named)} image parts"
        )
    if not named and not listed:
        refuse_other_columns(row)
    limits.refuse_placeholders(turns, len(listed), bool(named or literal))
    if named:
        listed = _filled(named, listed)
    elif listed and not literal and first.is_chat:
        turns = _before_first_question(raw, len(listed))
    turns = _with_system(turns, row.get("system"))
    notes = _notes(turns, [*limits.unused_of_row(row), *raw.unused])
    return MessageRow(
        turns, tuple(listed), extra_of(row, COLUMNS | set(first.columns) if first.columns else COLUMNS), notes
    )


@dataclass(frozen=True)
class _Talk:
    """Turns of a row. is_chat: images without a placeholder stand before the first question. columns: further ones that were read."""

    messages: Sequence[Any]
    is_chat: bool
    columns: tuple[str, ...] = ()


def _talks(row: Mapping[str, Any]) -> list[_Talk]:
    """At least one; several must say the same."""
    prompt, completion = row.get("prompt"), row.get("completion")
    there = [name for name in TALK[:2] if row.get(name) is not None]
    # Of an empty list only where nothing else is there: mixtures joined from two have both columns, one of them empty.
    found = [name for name in there if row[name] != []] or ([] if is_given(completion) else there[:1])
    if found:
        return [_Talk(_list(row[name], repr(name)), name == "messages" or _is_chat(row[name])) for name in found]
    if prompt is None and completion is None:
        columns = ", ".join(repr(str(name)[:40]) for name in list(row)[:12]) or "nothing"
        what = "the row has neither 'messages' nor 'conversations' nor 'prompt' and 'completion'"
        raise SkipSample("bad_row", f"{what}; it has {columns}")
    if completion is None and is_given(row.get("chosen")):
        raise SkipSample(
            "bad_row", "a preference pair ('chosen', 'rejected'): write the answer to learn as 'completion'"
        )
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _list(prompt, "'prompt'")
    said = completion
    said = [{"role": "assistant", "content": said}] if isinstance(said, str) else _list(said, "'completion'")
    return [_Talk([*asked, *said], True, TALK[2:])]


def _is_chat(messages: Any) -> bool:
    return bool(messages) and isinstance(messages[0], Mapping) and "from" not in messages[0]


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise SkipSample("bad_row", f"{what} is {kind_of(value)}, not a list of messages")
    return value


def _notes(turns: tuple[Turn, ...], unused: list[str]) -> tuple[tuple[str, str], ...]:
    notes = [("columns_unused", ", ".join(dict.fromkeys(unused)))] if unused else []
    for number, turn in enumerate(turns):
        if turn.role == "assistant" and PLACEHOLDER in turn.text:
            notes.append(("image_in_answer", f"turn {number}"))
            break
    return tuple(notes)


def _with_system(turns: tuple[Turn, ...], system: Any) -> tuple[Turn, ...]:
    if not is_given(system) or (isinstance(system, str) and not system.strip()):
        return turns
    text = checked_text(system, "'system'")
    first = turns[0] if turns else None
    if first is None or first.role != "system":
        return (Turn("system", text), *turns)
    if first.text.strip() != text.strip():
        raise SkipSample("bad_row", "the row has a system turn, and another text in 'system': keep one of them")
    return turns


def _among(refs: Sequence[ImageRef], members: Sequence[str]) -> list[ImageRef]:
    """``refs`` as the members of the same file name; empty where one of them is none."""
    by_name = {os.path.basename(name): ImageRef(name) for name in members}
    if refs and not members and any(ref.inline is None for ref in refs):
        raise SkipSample("image_missing", f"the row names {refs[0].name[:80]!r}, and no image travels with it")
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
        raise SkipSample(
            "placeholder_mismatch", f"{open_parts} image parts without a file, {len(listed)} images listed for the row"
        )
    waiting = iter(listed)
    return [ref if ref is not None else next(waiting) for ref in named]


def _before_first_question(raw: RawTurns, images: int) -> tuple[Turn, ...]:
    first = next((i for i, (role, _) in enumerate(raw.pieces) if role == "user"), None)
    if first is None:
        raise SkipSample("placeholder_mismatch", f"{images} images, and no user turn to place them in")
    before: Pieces = [None] * images
    return tuple(
        Turn(role, joined([*before, *pieces] if i == first else pieces)) for i, (role, pieces) in enumerate(raw.pieces)
    )
