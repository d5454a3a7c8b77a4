"""How a row becomes one string, and which characters of it are labels: one function a template.

A label is what the assistant says and the token that ends its turn; prompts, system text and white space behind that token are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.preparing.chat import Chat
from teacher_cache.preparing.fingerprint import text_hash
from teacher_cache.preparing.rendering import Rendered
from teacher_cache.records import Turn
from teacher_cache.sources.usable_samples import PLACEHOLDER


@dataclass(frozen=True)
class Template:
    """
    Attributes:
        render: (the model's chat template, turns, what the model's text has for an image) → the row; only ``chat`` asks for the first,
            only ``plain`` for the last. SkipSample where a row cannot be written.
        tokens: what the template writes that the tokenizer must know, each as one token of its own; no row may hold them.
        prompt: turns that end with the user's → what a model is given to answer; None: as the model's chat template asks.
    """

    render: Callable[[Any, Sequence[Turn], str], Rendered]
    tokens: tuple[str, ...] = ()
    prompt: Callable[[Sequence[Turn]], str] | None = None


def find_template(name: str) -> Template:
    if name not in TEMPLATES:
        raise KdcliError(f"unknown template {name!r}: the templates are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def write_prompt(name: str, chat: Chat, turns: Sequence[Turn]) -> tuple[str, bool]:
    """(what a model is given to answer the last question, whether the tokenizer's first token goes before it); SkipSample where the model's
    chat template refuses the row. A model of captions is asked as its chat template asks."""
    prompt = find_template(name).prompt
    return (prompt(turns), True) if prompt else chat.prompt(turns)


def check_tokens(name: str, tokenizer: Any, image_token: str | None) -> None:
    """CompatibilityError where the tokenizer would cut the template's own tokens into pieces: labels would end nowhere.

    image_token: what the model's processor replaces by vision tokens; None: it reads text alone.
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
    if image_token not in (None, PLACEHOLDER):
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
    begins = all([one.pop("begins") for one in made])  # apart: so hashes of older caches stay what they are
    return {"template": {"name": name, "sha256": text_hash(json.dumps([made, template.tokens, begins]))}}


# plain and chat


def render_plain(owner: Any, turns: Sequence[Turn], image: str = PLACEHOLDER) -> Rendered:
    """LLaVA's caption phase: user text dropped, ``image`` an image + caption + newline."""
    images = image * sum(turn.text.count(PLACEHOLDER) for turn in turns)
    caption = "".join(turn.text for turn in turns if turn.role == "assistant").strip() + "\n"
    text = images + caption
    spans = [(0, len(images)), (len(images), len(text))]
    return Rendered(text, spans, ["user", "assistant"], spans[1:])


def render_chat(owner: Chat, turns: Sequence[Turn], image: str = PLACEHOLDER) -> Rendered:
    """The model's own template (``chat.py``)."""
    return owner.render(turns)


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


def v1_prompt(turns: Sequence[Turn]) -> str:
    return render_v1(None, turns).text + V1_NAMES["assistant"]


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


def qwen_prompt(turns: Sequence[Turn]) -> str:
    return render_qwen(None, turns).text + f"{TURN_START}assistant\n"


def image_first(text: str) -> str:
    """A turn with one image begins with it, on a line of its own, whatever its place in the row was; several stay where they are."""
    if text.count(PLACEHOLDER) != 1:
        return text
    return f"{PLACEHOLDER}\n{text.replace(PLACEHOLDER, '').strip()}".strip()


def _system(turns: Sequence[Turn], default: str) -> tuple[str, Sequence[Turn]]:
    """(system text, the turns behind it)."""
    return (turns[0].text, turns[1:]) if turns[0].role == "system" else (default, turns)


TEMPLATES: dict[str, Template] = {
    "chat": Template(render_chat),
    "plain": Template(render_plain),
    "v1": Template(render_v1, (V1_END,), v1_prompt),
    "qwen_1_5": Template(render_qwen, (TURN_START, TURN_END), qwen_prompt),
}
"""By name, as ``template`` in kd.toml gives it."""
