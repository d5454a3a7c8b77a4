"""A row as one string: the character spans of its turns and answers, and what stands in it for an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from teacher_cache.preparing.bounded_templates import bounded


@dataclass(frozen=True)
class Rendered:
    """A row as one string: ``turns[i]`` is the character span of turn i and ``roles[i]`` who speaks, ``answers`` the label spans.

    images: where each image begins; None: images are not written out, each is one image token.
    begins: the tokenizer's own first token (``<s>`` of Llama) goes before the text; False: the template writes what it needs.
    """

    text: str
    turns: list[tuple[int, int]]
    roles: list[str]
    answers: list[tuple[int, int]]
    images: list[int] | None = None
    begins: bool = True


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
    whole = "".join([*text, rendered.text[at:]])
    return replace(rendered, text=whole, turns=spans[0], answers=spans[1], images=images)


def image_text(owner: Any, token: str) -> str:
    """What a chat template writes for an image (Qwen: its marks with it), the processor's image token where there is none."""
    if not owner.chat_template:
        return token
    image, mark = {"type": "image"}, {"type": "text", "text": "kdcli"}
    try:
        with bounded():
            shown, plain = (
                owner.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
                for content in ([image, mark], [mark])
            )
    except Exception:  # a template for strings, or a broken one: it is a program and raises what it likes
        return token
    before, prefix = shown.partition(mark["text"])[0], plain.partition(mark["text"])[0]
    written = before.removeprefix(prefix).strip() if before.startswith(prefix) else ""
    return written if token in written else token
