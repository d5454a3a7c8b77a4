"""How a row becomes one string, and which characters of it are labels: one function a template.

A label is what the assistant says and the token that ends its turn; prompts, system text and white space behind that token are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.fingerprint import text_hash
from teacher_cache.records import Turn
from teacher_cache.rendering import Rendered
from teacher_cache.rows import PLACEHOLDER


@dataclass(frozen=True)
class Template:
    """
    Attributes:
        render: (owner of the chat template, turns, what the model's text has for an image) → the row; only ``plain`` asks for the last.
        tokens: what the template writes that the tokenizer must know, each as one token of its own; no row may hold them.
        prompt: (owner, turns that end with the user's) → what a model is given to answer; None: the template asks nothing.
        begins: the tokenizer's own first token (``<s>`` of Llama) goes before the text; False: the template writes what it needs.
    """

    render: Callable[[Any, Sequence[Turn], str], Rendered]
    tokens: tuple[str, ...] = ()
    prompt: Callable[[Any, Sequence[Turn]], str] | None = None
    begins: bool = True


def find_template(name: str) -> Template:
    if name not in TEMPLATES:
        raise KdcliError(f"unknown template {name!r}: the templates are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def write_prompts(name: str, owner: Any, rows: Sequence[Sequence[Turn]]) -> tuple[list[str], bool]:
    """(what a model is given to answer each row's last question, whether the tokenizer's first token goes before it). A model of captions
    is asked as its chat template asks."""
    template = find_template(name)
    asking = template if template.prompt else TEMPLATES["chat"]
    assert asking.prompt is not None
    return [asking.prompt(owner, turns) for turns in rows], asking.begins


def check_tokens(name: str, tokenizer: Any, image_token: str) -> None:
    """CompatibilityError where the tokenizer would cut the template's own tokens into pieces: labels would end nowhere.

    image_token: what the model's processor replaces by vision tokens.
    """
    template = find_template(name)
    if not template.tokens:
        return
    known = tokenizer.get_added_vocab()
    if lacking := [token for token in template.tokens if token not in known]:
        raise CompatibilityError(
            f"template {name!r} needs {' and '.join(lacking)} as one token each, and the model's tokenizer has no such token: "
            'use template = "chat", or a model of the template\'s family'
        )
    if image_token != PLACEHOLDER:
        raise CompatibilityError(
            f'template {name!r} writes an image as {PLACEHOLDER}, but this model reads {image_token}: use template = "chat"'
        )
    around = tokenizer("")["input_ids"]
    if around not in ([], [tokenizer.bos_token_id]):
        added = " ".join(tokenizer.convert_ids_to_tokens(around))
        raise CompatibilityError(
            f"template {name!r}: the tokenizer adds {added!r} to every text, more than one first token, and the template writes "
            "its ends itself: set add_eos_token = false in its configuration"
        )


def template_fingerprint(name: str) -> dict[str, Any]:
    """``{"template": {"name", "sha256"}}`` of a template that is written here, by what it makes of two probe rows. Empty for ``chat``,
    whose hash is among the processor's, and for ``plain``, which is its name."""
    template = TEMPLATES.get(name)
    if template is None or not template.tokens:
        return {}
    talk = (
        Turn("user", f"{PLACEHOLDER}\nq"),
        Turn("assistant", "a"),
        Turn("user", f"r {PLACEHOLDER}"),
        Turn("assistant", " b"),
    )
    made = [asdict(template.render(None, turns, PLACEHOLDER)) for turns in (talk, (Turn("system", "s"), *talk))]
    return {"template": {"name": name, "sha256": text_hash(json.dumps([made, template.tokens, template.begins]))}}


# plain and chat


def render_plain(owner: Any, turns: Sequence[Turn], image: str = PLACEHOLDER) -> Rendered:
    """LLaVA's caption phase: user text dropped, ``image`` an image + caption + newline."""
    images = image * sum(turn.text.count(PLACEHOLDER) for turn in turns)
    caption = "".join(turn.text for turn in turns if turn.role == "assistant").strip() + "\n"
    text = images + caption
    spans = [(0, len(images)), (len(images), len(text))]
    return Rendered(text, spans, ["user", "assistant"], spans[1:])


def render_chat(owner: Any, turns: Sequence[Turn], image: str = PLACEHOLDER) -> Rendered:
    """The model's own template. Answer spans are prefix differences, so they hold for templates without generation tags; the
    end-of-turn token is a label, white space that the template writes after it is not."""
    _need_template(owner)
    messages = _messages(turns)

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


def chat_prompt(owner: Any, turns: Sequence[Turn]) -> str:
    _need_template(owner)
    return str(owner.apply_chat_template(_messages(turns), tokenize=False, add_generation_prompt=True))


def _need_template(owner: Any) -> None:
    if not owner.chat_template:
        raise CompatibilityError('the model has no chat template: use template = "plain" or a model that has one')


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": content(turn.text)} for turn in turns]


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


# v1 and qwen_1_5: LLaVA's conversations of these names


V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
V1_NAMES = {"user": "USER:", "assistant": "ASSISTANT:"}
V1_END = "</s>"


def render_v1(owner: Any, turns: Sequence[Turn], image: str = PLACEHOLDER) -> Rendered:
    """Vicuna v1: ``SYSTEM USER: q ASSISTANT: a</s>USER: …``: one space behind system and question, nothing behind ``</s>``, and of an
    empty question the name alone. A system turn stands in place of the default sentence.

    The space before an answer is part of its first token in Llama's vocabulary, and a prompt to be answered ends with the colon: so the
    label begins right behind the colon.
    """
    system, talk = _system(turns, V1_SYSTEM)
    text, answers = system + " ", []
    spans = [(0, len(text))] if len(talk) < len(turns) else []
    for turn in talk:
        start = len(text) if spans else 0
        text += V1_NAMES[turn.role]
        said = len(text)
        if message := image_first(turn.text):
            text += f" {message}" + (V1_END if turn.role == "assistant" else " ")
        if turn.role == "assistant":
            answers.append((said, len(text)))
        spans.append((start, len(text)))
    return Rendered(text, spans, [turn.role for turn in turns], answers)


def v1_prompt(owner: Any, turns: Sequence[Turn]) -> str:
    return render_v1(owner, turns).text + V1_NAMES["assistant"]


QWEN_SYSTEM = "You are a helpful assistant."
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"


def render_qwen(owner: Any, turns: Sequence[Turn], image: str = PLACEHOLDER) -> Rendered:
    """ChatML: every turn between ``<|im_start|>role`` and ``<|im_end|>``, a system turn first, the default one where the row has none."""
    system, talk = _system(turns, QWEN_SYSTEM)
    text, answers = f"{TURN_START}system\n{system}{TURN_END}\n", []
    spans = [(0, len(text))] if len(talk) < len(turns) else []
    for turn in talk:
        start = len(text) if spans else 0
        text += f"{TURN_START}{turn.role}\n"
        said = len(text)
        text += image_first(turn.text) + TURN_END
        if turn.role == "assistant":
            answers.append((said, len(text)))
        text += "\n"
        spans.append((start, len(text)))
    return Rendered(text, spans, [turn.role for turn in turns], answers)


def qwen_prompt(owner: Any, turns: Sequence[Turn]) -> str:
    return render_qwen(owner, turns).text + f"{TURN_START}assistant\n"


def image_first(text: str) -> str:
    """A turn with one image begins with it, on a line of its own, whatever its place in the row was; several stay where they are."""
    if text.count(PLACEHOLDER) != 1:
        return text
    return f"{PLACEHOLDER}\n{text.replace(PLACEHOLDER, '').strip()}".strip()


def _system(turns: Sequence[Turn], default: str) -> tuple[str, Sequence[Turn]]:
    """(system text, the turns behind it)."""
    return (turns[0].text, turns[1:]) if turns[0].role == "system" else (default, turns)


TEMPLATES: dict[str, Template] = {
    "chat": Template(render_chat, prompt=chat_prompt, begins=False),
    "plain": Template(render_plain),
    "v1": Template(render_v1, (V1_END,), v1_prompt),
    "qwen_1_5": Template(render_qwen, (TURN_START, TURN_END), qwen_prompt),
}
"""By name, as ``template`` in kd.toml gives it."""
