"""The model's own chat template: how content is passed to it, what it makes of a row, and whether it can be used at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

from teacher_cache.errors import CompatibilityError, SkipSample, one_line
from teacher_cache.preparing.bounded_templates import bounded
from teacher_cache.preparing.fingerprint import PREPARATION
from teacher_cache.preparing.rendering import Rendered
from teacher_cache.preparing.skeleton import (
    Message,
    Skeleton,
    check_images,
    find_skeleton,
    mark,
    pieces_of,
    shape_of,
    spans_by_prefixes,
    texts_of,
    user_header,
)
from teacher_cache.records import Turn
from teacher_cache.sources.usable_samples import PLACEHOLDER

STYLES: Mapping[str, Callable[[Turn], bool]] = {
    "parts": lambda turn: True,
    "parts of users alone": lambda turn: turn.role == "user",
    "parts beside images alone": lambda turn: PLACEHOLDER in turn.text,
    "strings": lambda turn: False,
}
"""Which turns are passed as a list of parts, the others as strings; the first that the template writes rightly is taken."""
_TALK = (
    Turn("user", "What is\n3 < 4?"),
    Turn("assistant", "A fact."),
    Turn("user", "Is it?"),
    Turn("assistant", "It is,\n\nyes."),
)
_SHOWN = (Turn("user", f"{PLACEHOLDER}\nWhat is this?"), *_TALK[1:])
_SYSTEM = Turn("system", "Be brief.")
PROBES: Mapping[str, tuple[tuple[Turn, ...], ...]] = {
    kind: (turns[:2], turns, (_SYSTEM, *turns[:2])) for kind, turns in (("text", _TALK), ("image", _SHOWN))
}
"""An exchange, a talk of two, an exchange behind a system turn; without an image and with one."""
FIX = 'fix chat_template.jinja in the model\'s folder, or use another template ("v1", "qwen_1_5", "plain")'


class Chat:
    """A model's chat template.

    Args:
        processor: the model's ``AutoProcessor``, or a tokenizer. Its own template counts, else that of its tokenizer.
        version: of the preparation, see ``PREPARATION``.
    """

    def __init__(self, processor: Any, version: int = PREPARATION):
        self.version, self.processor = version, processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.owner = processor if getattr(processor, "chat_template", None) else self.tokenizer
        self.image = str(getattr(processor, "image_token", PLACEHOLDER))
        self._skeletons: dict[Any, Skeleton | str] = {}
        self._prompts: dict[Any, str] = {}
        """By shape of a row; a text says why rows of this shape are refused."""

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The row as the template writes it. SkipSample (template_refused) where it refuses the row or labels cannot be placed."""
        messages = self.messages(turns)
        if self.version == 1:
            return replace(spans_by_prefixes(messages, self._write), begins=False)
        skeleton = self._skeleton(messages)
        text = self._write(messages)
        made = skeleton.spans(text, messages) or self._looked_into(skeleton, text, messages)
        return replace(made, begins=self.begins(text))

    def prompt(self, turns: Sequence[Turn]) -> tuple[str, bool]:
        """(what a model is given to answer the last turn, whether the tokenizer's first token goes before it); SkipSample as ``render``."""
        messages = self.messages(turns)
        shape = shape_of(messages)
        if shape not in self._prompts:
            self._prompts[shape] = self._prompt_fault(messages)
        if fault := self._prompts[shape]:
            raise SkipSample("template_refused", fault)
        text = self._write(messages, True)
        return text, self.begins(text)

    def messages(self, turns: Sequence[Turn]) -> list[Message]:
        """As the template wants them."""
        return self._messages(turns, self._style[0])

    def begins(self, text: str) -> bool:
        """Whether the tokenizer's own first token goes before ``text``: as in ``apply_chat_template(tokenize=True)`` of the owner.

        A tokenizer never adds it to a chat, a processor does unless the template wrote it.
        """
        if self.version == 1 or self.owner is self.tokenizer:
            return False
        first = self.tokenizer.bos_token
        return self._adds_first and not (first is not None and text.startswith(first))

    def check(self, images: bool = False) -> None:
        """Before any row: CompatibilityError where the template writes no probe rightly, or, with ``images``, none about an image."""
        name, faults = self._style
        lost = [kind for kind in PROBES if len(faults[kind]) == len(PROBES[kind])]
        if lost == list(PROBES) or (images and "image" in lost):
            what = "writes no row with an image" if lost == ["image"] else "cannot be used"
            raise CompatibilityError(
                f'template "chat": the model\'s chat template {what} (content as {name}: {faults[lost[0]][0]}): {FIX}'
            )

    @cached_property
    def _style(self) -> tuple[str, dict[str, list[str]]]:
        """(name, what goes wrong with the probes of each kind)"""
        if not self.owner.chat_template:
            raise CompatibilityError(
                "the model has no chat template (base models have none): put the chat_template.jinja of its chat model into its folder, or "
                'use template = "plain" (the answers alone), "qwen_1_5" or "v1" (where its tokenizer has their tokens)'
            )
        if self.version == 1:
            return "parts", {kind: [] for kind in PROBES}
        tried = []
        for name in STYLES:
            faults = {kind: self._faults(name, probes) for kind, probes in PROBES.items()}
            wrong = sum(map(len, faults.values()))
            if not wrong:
                return name, faults
            # Both kinds of rows come before talks and system turns: rows of these may be skipped.
            lost = sum(len(faults[kind]) == len(PROBES[kind]) for kind in PROBES)
            tried.append(((lost, wrong), name, faults))
        return min(tried, key=lambda one: one[0])[1:]

    def _faults(self, style: str, probes: Sequence[Sequence[Turn]]) -> list[str]:
        """Of the probes that are not written rightly, why."""
        faults = []
        for turns in probes:
            messages = self._messages(turns, style)
            try:
                skeleton = find_skeleton(messages, self._write, self.image, lambda: "")
                if skeleton.spans(self._write(messages), messages) is None:
                    faults.append("the chat template writes other texts than it is given")
            except SkipSample as skip:
                faults.append(skip.detail)
        return faults

    def _messages(self, turns: Sequence[Turn], style: str) -> list[Message]:
        as_parts = STYLES[style]
        return [
            {
                "role": turn.role,
                "content": content(turn.text) if as_parts(turn) else turn.text.replace(PLACEHOLDER, self.image),
            }
            for turn in turns
        ]

    def _skeleton(self, messages: Sequence[Message]) -> Skeleton:
        shape = shape_of(messages)
        if shape not in self._skeletons:
            try:
                self._skeletons[shape] = find_skeleton(messages, self._write, self.image, lambda: self._header)
            except SkipSample as skip:
                self._skeletons[shape] = skip.detail
        found = self._skeletons[shape]
        if isinstance(found, str):
            raise SkipSample("template_refused", found)
        return found

    @cached_property
    def _header(self) -> str:
        return user_header(self.messages(_TALK[:3]), self._write)

    def _looked_into(self, skeleton: Skeleton, text: str, messages: Sequence[Message]) -> Rendered:
        """A row whose last answer the template changes by what it says: all of it must still be there, white space aside."""
        made = skeleton.spans_but_last(text, messages)
        if made is not None:
            start, stop = made.turns[-1]  # the generation prompt may have begun the thought
            said = "".join("".join(texts_of(messages[-1])).split())
            if said in "".join(text[start:stop].split()):
                return made
        raise SkipSample("template_refused", "the chat template rewrites texts of the row: labels cannot be placed")

    def _prompt_fault(self, messages: Sequence[Message]) -> str:
        """Why no prompt of this shape can be written; "" where it can."""
        marked, marks = mark(messages)
        try:
            check_images(marked, pieces_of(self._write(marked, True), marks), self.image)
        except SkipSample as skip:
            return skip.detail
        return ""

    def _write(self, messages: Sequence[Message], prompt: bool = False) -> str:
        try:
            with bounded():
                return str(self.owner.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))
        except (MemoryError, CompatibilityError):
            raise
        except Exception as error:  # a template is a program: it raises what it likes
            said = one_line(error)[:160] or type(error).__name__
            raise SkipSample("template_refused", f"the chat template refuses it: {said}") from None

    @cached_property
    def _adds_first(self) -> bool:
        """Whether the processor has its tokenizer add special tokens where nobody says anything of it."""
        defaults = getattr(getattr(self.processor, "valid_processor_kwargs", None), "_defaults", {})
        own = {**defaults.get("text_kwargs", {}), **(getattr(self.processor, "text_kwargs", None) or {})}
        return bool(own.get("add_special_tokens", True))


def chat_of(processor: Any) -> Chat:
    """The newest ``Chat`` of a processor; the same one while its template is the same."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return _chat_of(processor, *(str(getattr(one, "chat_template", None)) for one in (processor, tokenizer)))


@lru_cache(maxsize=4)
def _chat_of(processor: Any, template: str, tokenizers: str) -> Chat:
    return Chat(processor)


def content(text: str) -> list[dict[str, str]]:
    """LLaVA text with placeholders → message content; newlines that only set the placeholder apart are the template's business."""
    pieces = text.split(PLACEHOLDER)
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    parts: list[dict[str, str]] = []
    for i, piece in enumerate(pieces):
        if i:
            parts.append({"type": "image"})
        if stripped := piece.strip("\n"):
            parts.append({"type": "text", "text": stripped})
    return parts
