"""A row as one string: turns through the chat template, with the character spans of turns and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.records import Turn

TEMPLATES = ("chat", "plain")
PLACEHOLDER = "<image>"
"""Of mixtures; what stands for an image in a model's own text is the processor's business."""


@dataclass(frozen=True)
class Rendered:
    """A row as one string: ``turns[i]`` is the character span of turn i and ``roles[i]`` who speaks, ``answers`` the label spans.

    images: where each image begins; None: images are not written out, each is one image token.
    """

    text: str
    turns: list[tuple[int, int]]
    roles: list[str]
    answers: list[tuple[int, int]]
    images: list[int] | None = None


def expanded(rendered: Rendered, replaced: Sequence[Mapping[str, Any]]) -> Rendered:
    """The same row with images written out as the processor does; spans follow."""
    text: list[str] = []
    moved: list[tuple[int, int]] = []
    images, at = [], 0
    for one in replaced:
        start, end = one["span"]
        images.append(one["new_span"][0])
        text += [rendered.text[at:start], one["replacement"]]
        moved.append((end, len(one["replacement"]) - (end - start)))
        at = end

    def follow(place: int) -> int:
        return place + sum(longer for end, longer in moved if end <= place)

    spans = [[(follow(a), follow(b)) for a, b in each] for each in (rendered.turns, rendered.answers)]
    return Rendered("".join([*text, rendered.text[at:]]), spans[0], rendered.roles, spans[1], images)


def render(owner: Any, tokenizer: Any, turns: Sequence[Turn], template: str, image_text: str = PLACEHOLDER) -> Rendered:
    """The row as text with the spans of its turns and answers.

    ``plain`` (LLaVA's caption phase): user text dropped, ``image_text`` an image + caption + newline. ``chat``: the model's own template;
    answer spans are prefix differences, so they hold for templates without generation tags; the end-of-turn token is a label,
    white space that the template writes after it is not.
    """
    if template == "plain":
        images = image_text * sum(turn.text.count(PLACEHOLDER) for turn in turns)
        caption = "".join(turn.text for turn in turns if turn.role == "assistant").strip() + "\n"
        text = images + caption
        spans = [(0, len(images)), (len(images), len(text))]
        return Rendered(text, spans, ["user", "assistant"], spans[1:])
    if template != "chat":
        raise KdcliError(f"unknown template {template!r}: the templates are {', '.join(TEMPLATES)}")
    if not owner.chat_template:
        raise CompatibilityError('the model has no chat template: use template = "plain" or a model that has one')
    messages = [{"role": turn.role, "content": content(turn.text)} for turn in turns]

    def prefix(count: int, prompt: bool = False) -> str:
        return owner.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    ends = [prefix(i + 1) for i in range(len(turns))]
    text, spans, answers = ends[-1], [], []
    for i, turn in enumerate(turns):
        if not text.startswith(ends[i]):
            raise CompatibilityError(
                "the chat template rewrites earlier turns (its prefixes differ): labels cannot be placed"
            )
        start = len(ends[i - 1]) if i else 0
        spans.append((start, len(ends[i])))
        if turn.role == "assistant":
            prompt = prefix(i, prompt=True)
            if not ends[i].startswith(prompt):
                raise CompatibilityError(
                    "the chat template's generation prompt is no prefix of its answers: labels cannot be placed"
                )
            answers.append((len(prompt), len(ends[i].rstrip())))
    return Rendered(text, spans, [turn.role for turn in turns], answers)


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


def image_text(owner: Any, token: str) -> str:
    """What a chat template writes for an image (Qwen: its marks with it), the processor's image token where there is none."""
    if not owner.chat_template:
        return token
    image, mark = {"type": "image"}, {"type": "text", "text": "kdcli"}
    try:
        shown, plain = (
            owner.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            for content in ([image, mark], [mark])
        )
    except (TemplateError, TypeError):  # a template for strings
        return token
    before, prefix = shown.partition(mark["text"])[0], plain.partition(mark["text"])[0]
    written = before.removeprefix(prefix).strip() if before.startswith(prefix) else ""
    return written if token in written else token
