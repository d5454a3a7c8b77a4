"""What a chat template writes around the texts of a conversation: where turns end, where labels begin.

The conversation is written with a mark in place of every text. So no text is searched for in a row that may hold it twice, and what
stands between the marks is the template's own. It is the same for all rows of one shape (roles, number of texts and images).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from teacher_cache.errors import SkipSample
from teacher_cache.preparing.rendering import Rendered

Message = Mapping[str, Any]
"""``{"role", "content"}``; content is a string or a list of ``{"type": "image"}`` and ``{"type": "text", "text"}``."""
Write = Callable[[Sequence[Message], bool], str]
"""(messages, with the generation prompt behind them) → what the template makes of them; SkipSample where it refuses."""
Place = tuple[int, int]
"""(piece, characters into it)."""


@dataclass(frozen=True)
class Skeleton:
    """
    Attributes:
        pieces: what stands before, between and behind the texts, one more than there are texts.
        ends: of every turn. starts: by turn, where the label of an answer begins.
    """

    pieces: list[str]
    ends: list[Place]
    starts: dict[int, Place]

    def spans(self, text: str, messages: Sequence[Message]) -> Rendered | None:
        """Turns and answers of a row of this shape; None where ``text`` is not the pieces with the row's texts between them."""
        at = _follow(text, self.pieces, [one for message in messages for one in texts_of(message)])
        return self._placed(text, messages, at) if at and at[-1] + len(self.pieces[-1]) == len(text) else None

    def spans_but_last(self, text: str, messages: Sequence[Message]) -> Rendered | None:
        """The same where a template looks into the last answer (thoughts between marks): all that stands in its place is label."""
        if (last := len(messages) - 1) not in self.starts:
            return None
        piece, into = self.starts[last]
        before = [*self.pieces[:piece], self.pieces[piece][:into]]
        at = _follow(text, before, [one for message in messages[:-1] for one in texts_of(message)])
        behind = len(text) - len(self.pieces[-1])
        if at is None or not text.endswith(self.pieces[-1]) or behind < at[-1] + into:
            return None
        return self._placed(text, messages, [*at, *[behind] * (len(self.pieces) - len(at))])

    def _placed(self, text: str, messages: Sequence[Message], at: Sequence[int]) -> Rendered:
        """at: where every piece begins."""
        ends = [at[piece] + into for piece, into in self.ends]
        turns = list(zip([0, *ends], ends))
        # White space that the template writes behind the end of a turn is no label.
        answers = [(at[piece] + into, len(text[: ends[turn]].rstrip())) for turn, (piece, into) in self.starts.items()]
        return Rendered(text, turns, [message["role"] for message in messages], answers)


def texts_of(message: Message) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def shape_of(messages: Sequence[Message]) -> tuple[Any, ...]:
    """What a skeleton depends on."""
    return tuple(
        (m["role"], "text" if isinstance(m["content"], str) else tuple(part["type"] for part in m["content"]))
        for m in messages
    )


def find_skeleton(messages: Sequence[Message], write: Write, image: str, header: Callable[[], str]) -> Skeleton:
    """The skeleton of these messages' shape.

    Args:
        image: what stands for one image in what the processor reads. header: gives what the template writes before a user's text.

    Raises:
        SkipSample: template_refused: a text or an image is lost, repeated or moved; an answer's label cannot be placed.
    """
    marked, marks = mark(messages)
    before = [0]
    for message in marked:
        before.append(before[-1] + len(texts_of(message)))

    @cache
    def cut(turns: int, prompt: bool = False) -> list[str]:
        return pieces_of(write(marked[:turns], prompt), marks[: before[turns]])

    whole = cut(len(marked))
    check_images(marked, whole, image)
    ends: list[Place] = []
    starts: dict[int, Place] = {}
    for turn, message in enumerate(marked):
        piece = before[turn + 1]
        if message["role"] == "assistant":
            starts[turn], tail = _answer(turn, before[turn], whole, cut)
            # The end of an answer is the same whether something follows it or not, but for white space.
            ending = next((one for one in (tail, tail.rstrip()) if whole[piece].startswith(one)), None)
            if ending is None or len(texts_of(message)) == 0:
                raise _rewritten(turn)
            ends.append((piece, len(ending)))
        elif turn == len(marked) - 1:
            ends.append((piece, len(whole[piece])))
        elif message["role"] == "system":
            # It is never written alone: templates may want a user's turn. What stands before other users' texts begins the next turn.
            found = whole[piece].rfind(header()) if header() else -1
            ends.append((piece, found if found >= 0 else len(whole[piece])))
        else:
            ends.append((piece, _alike(cut(turn + 1)[piece], whole[piece])))
    return Skeleton(whole, ends, starts)


def _answer(turn: int, piece: int, whole: list[str], cut: Callable[..., list[str]]) -> tuple[Place, str]:
    """(where the label of the answer in this turn begins, what the template writes behind it).

    The row before it must be what a model is asked with; only thoughts that the answer had while it was the last turn may be gone, as
    "thinking" templates take them out of earlier answers.
    """
    asked, last, question = cut(turn, True), cut(turn + 1), cut(turn)[piece]
    if not last[piece].startswith(asked[piece]):
        raise _no_prefix()
    same = whole[:piece] == last[:piece] == asked[:piece] and last[piece].startswith(whole[piece])
    headless = len(whole[piece]) <= len(question) < len(asked[piece])
    if not same or (headless and whole[piece] != last[piece]):
        raise _rewritten(turn)
    return (piece, min(len(asked[piece]), len(whole[piece]))), last[-1]


def _alike(one: str, other: str) -> int:
    """Characters that both begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _no_prefix() -> SkipSample:
    return SkipSample(
        "template_refused",
        "the chat template's generation prompt is not a prefix of its answers: labels cannot be placed",
    )


def _rewritten(turn: int) -> SkipSample:
    return SkipSample(
        "template_refused",
        f"the chat template rewrites earlier turns: turn {turn} changes when others follow: labels cannot be placed",
    )


def user_header(messages: Sequence[Message], write: Write) -> str:
    """What stands before the text of a user's turn behind an answer; "" where it cannot be told. messages: user, assistant, user."""
    marked, marks = mark(messages)
    try:
        whole, earlier = (pieces_of(write(marked[:n], False), marks[:n]) for n in (3, 2))
    except SkipSample:
        return ""
    return whole[2][len(earlier[2]) :] if whole[2].startswith(earlier[2]) else ""


def pieces_of(text: str, marks: Sequence[tuple[str, str]]) -> list[str]:
    """What stands around the marks, which are (mark, whose); SkipSample unless each stands there once, in order."""
    if "\\nof kdcli." in text:
        raise SkipSample("template_refused", "the chat template writes content as a Python or JSON list")
    pieces, at = [], 0
    for mark, whose in marks:
        if (times := text.count(mark)) != 1:
            raise SkipSample("template_refused", f"the chat template writes the text of {whose} {times} times")
        if (place := text.find(mark)) < at:
            raise SkipSample(
                "template_refused", f"the chat template writes the text of {whose} before that of an earlier turn"
            )
        pieces.append(text[at:place])
        at = place + len(mark)
    return [*pieces, text[at:]]


def check_images(messages: Sequence[Message], pieces: Sequence[str], image: str) -> None:
    """SkipSample unless as many images are written as the messages have parts of that kind."""
    images = sum(
        part["type"] == "image" for m in messages if not isinstance(m["content"], str) for part in m["content"]
    )
    if (written := "".join(pieces).count(image)) != images:
        raise SkipSample("template_refused", f"the chat template writes {written} times {image} for {images} images")


def mark(messages: Sequence[Message]) -> tuple[list[Message], list[tuple[str, str]]]:
    """(the messages with marks as texts, the marks in order with the turn that each is of)."""
    marks: list[tuple[str, str]] = []

    def next_mark(turn: int, role: str) -> str:
        # The line break shows a Python or JSON list that is written as such: it stands there as two characters.
        marks.append((f"Text {len(marks)}\nof kdcli.", f"turn {turn} ({role})"))
        return marks[-1][0]

    marked: list[Message] = []
    for turn, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if isinstance(content, str):
            marked.append({"role": role, "content": next_mark(turn, role)})
        else:
            parts = [part if part["type"] == "image" else {**part, "text": next_mark(turn, role)} for part in content]
            marked.append({"role": role, "content": parts})
    return marked, marks


def _follow(text: str, pieces: Sequence[str], texts: Sequence[str]) -> list[int] | None:
    """Where each piece begins in ``text``, which has the texts between them, as they are or without white space around them."""
    if not text.startswith(pieces[0]):
        return None
    at, here = [0], len(pieces[0])
    for one, piece in zip(texts, pieces[1:]):
        forms = (one, one.strip(), one.lstrip(), one.rstrip(), one.strip("\n"), one.lstrip("\n"), one.rstrip("\n"))
        found = next((form for form in forms if text.startswith(form + piece, here)), None)
        if found is None:
            return None
        at.append(here + len(found))
        here = at[-1] + len(piece)
    return at


def spans_by_prefixes(messages: Sequence[Message], write: Write) -> Rendered:
    """What preparation version 1 did: the row is written turn by turn, a system turn alone too.

    Raises:
        SkipSample: template_refused: what is written of a turn is no prefix of what is written of more.
    """
    text = write(messages, False)
    ends = [0]
    answers = []
    for turn, message in enumerate(messages):
        until = write(messages[: turn + 1], False)
        if not text.startswith(until):
            raise _rewritten(turn)
        ends.append(len(until))
        if message["role"] == "assistant":
            prompt = write(messages[:turn], True)
            if not until.startswith(prompt):
                raise _no_prefix()
            answers.append((len(prompt), len(until.rstrip())))
    return Rendered(text, list(pairwise(ends)), [message["role"] for message in messages], answers)
