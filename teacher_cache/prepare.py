"""A row as tokens and pixels, for any model: chat template, images, label mask, vision layout.

Two conventions are stated here once. Response rows are *shifted*: the row at position t-1 predicts the token at t.
Vision rows are *not* shifted: they are taken at the vision token itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from teacher_cache.errors import CompatibilityError, KdcliError, SkipRow
from teacher_cache.fingerprint import processor_fingerprint
from teacher_cache.layout import image_layout
from teacher_cache.records import ROLES, ImageLayout, Prepared, Sample, TextTokens, Turn
from teacher_cache.rows import check_turns, decode_image, row_key

TEMPLATES = ("chat", "plain")
PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Limits:
    """max_length: tokens with placeholders expanded. over_length: ``skip`` the row, or ``cut`` it at a turn border."""

    max_length: int = 2048
    over_length: str = "skip"

    def __post_init__(self) -> None:
        if self.over_length not in ("skip", "cut"):
            raise KdcliError(f"over_length must be skip or cut, got {self.over_length!r}")


@dataclass(frozen=True)
class Rendered:
    """A row as one string: ``turns[i]`` is the character span of turn i and ``roles[i]`` who speaks, ``answers`` the label spans."""

    text: str
    turns: list[tuple[int, int]]
    roles: list[str]
    answers: list[tuple[int, int]]


class Preparer:
    """Turns rows into what one model reads.

    Args:
        processor: the model's ``AutoProcessor``. config: its configuration (image token id, patch size).
    """

    def __init__(self, processor: Any, config: Any, limits: Limits = Limits()):
        self.processor, self.config, self.limits = processor, config, limits
        self.tokenizer = processor.tokenizer
        self.image_token_id = int(config.image_token_id)
        self._text_alone: set[str] = set()
        """Templates of which a row without images was seen to become what the tokenizer alone says: no processor is asked again."""
        special = {t for t in self.tokenizer.all_special_tokens if t != PLACEHOLDER}
        self._special = re.compile("|".join(map(re.escape, sorted(special)))) if special else None
        if self.tokenizer.convert_ids_to_tokens(self.image_token_id) is None:
            raise CompatibilityError(
                f"image token id {self.image_token_id} is not in the tokenizer: not this model's processor"
            )

    def fingerprint(self) -> dict[str, Any]:
        """What decides how rows become tokens and pixels, JSON-able."""
        return {
            **processor_fingerprint(self.processor),
            "max_length": self.limits.max_length,
            "over_length": self.limits.over_length,
        }

    def prepare(self, sample: Sample, template: str = "chat", max_image_pixels: int = 89_478_485) -> Prepared:
        """Tokens, pixels and row positions of one row; SkipRow with a reason where the row cannot be used."""
        check_turns(sample)
        images = [decode_image(image, max_image_pixels) for image in sample.images]
        return self._prepare(sample, template, images, row_key(sample))

    def check_template(self, template: str) -> None:
        """Before any row is read: CompatibilityError or KdcliError where ``template`` cannot be used with this model."""
        turns = tuple(Turn(role, f"{role} {number}") for number in (1, 2) for role in ("user", "assistant"))
        with suppress(SkipRow):  # a probe over the length limit says nothing about the template
            self._prepare(Sample("", 0, "", "a probe row", turns), template, [], "probe")

    def _prepare(self, sample: Sample, template: str, images: list[Any], key: str) -> Prepared:
        if self._special and (found := next(filter(None, (self._special.search(t.text) for t in sample.turns)), None)):
            raise SkipRow("reserved_token", f"the text holds {found.group()!r}, which the tokenizer reserves")
        rendered = render(self._chat_owner(), self.tokenizer, sample.turns, template)
        text = self._tokenize(rendered, template)
        input_ids, inputs = text.ids.to(torch.int64), {}
        if images or template not in self._text_alone:
            inputs = self._expand(rendered.text, images, template)
            input_ids = inputs.pop("input_ids")[0].to(torch.int64)
            if not torch.equal(input_ids[input_ids != self.image_token_id].to(torch.uint32), text.ids):
                raise CompatibilityError(
                    f"{sample.place}: the processor's expansion changes text tokens; this family is not supported"
                )
            if not images and not inputs:
                self._text_alone.add(template)
        if len(input_ids) > self.limits.max_length:
            return self._shorten(sample, template, images, key, len(input_ids))
        return self.assemble(sample, key, input_ids, text, images, inputs)

    def assemble(
        self,
        sample: Sample,
        key: str,
        input_ids: torch.Tensor,
        text: TextTokens,
        images: list[Any],
        pixels: dict[str, torch.Tensor],
    ) -> Prepared:
        """The row of these tokens: where its vision, text and response rows stand."""
        is_vision = input_ids == self.image_token_id
        text_positions = torch.nonzero(~is_vision).flatten()
        labels_at = text_positions[text.response]
        return Prepared(
            key=key,
            part=sample.part,
            input_ids=input_ids,
            vision_positions=torch.nonzero(is_vision).flatten(),
            text_positions=text_positions,
            response_rows=labels_at - 1,
            labels=input_ids[labels_at],
            text=text,
            layout=self._layout(images, pixels, int(is_vision.sum()), sample.place),
            pixels=pixels,
            turns=len(sample.turns),
            images=sample.images[: len(images)],
        )

    def _tokenize(self, rendered: Rendered, template: str) -> TextTokens:
        """Tokens of the text without the images, each with its turn, role and label flag, by character offsets."""
        encoded = self.tokenizer(rendered.text, add_special_tokens=template == "plain", return_offsets_mapping=True)
        # numpy: a dozen operations on a handful of tokens, each several times cheaper than torch's.
        ids = np.array(encoded["input_ids"], dtype=np.int64)
        spans = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        turn, response = np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
        # By the token's last character: a token that swallows the space before an answer belongs to the answer.
        last = spans[:, 1] - 1
        for number, (start, stop) in enumerate(rendered.turns):
            turn[(last >= start) & (last < stop)] = number
        for start, stop in rendered.answers:
            response |= (last >= start) & (last < stop) & (spans[:, 1] > spans[:, 0])
        response[0] = False  # nothing stands before the first token that could predict it
        role = np.array([ROLES.index(role) for role in rendered.roles], dtype=np.uint8)[turn]
        is_text = ids != self.image_token_id
        columns = (ids[is_text].astype(np.uint32), role[is_text], turn[is_text].astype(np.uint16), response[is_text])
        image_at = tuple(np.cumsum(is_text)[~is_text].tolist())
        ids_N, role_N, turn_N, response_N = map(torch.from_numpy, columns)
        return TextTokens(ids_N, role_N, turn_N, response_N, image_at)

    def _expand(self, text: str, images: list[Any], template: str) -> dict[str, torch.Tensor]:
        arguments = {"text": [text], "return_tensors": "pt", "add_special_tokens": template == "plain"}
        if images:
            arguments["images"] = images
        try:
            inputs = dict(self.processor(**arguments))
        except (ValueError, IndexError) as error:
            raise SkipRow("processor_refused", f"the processor refuses the row: {error}") from None
        inputs.pop("attention_mask", None)
        return inputs

    def _layout(self, images: list[Any], inputs: Mapping[str, Any], tokens: int, place: str) -> tuple[ImageLayout, ...]:
        if not images:
            return ()
        layout = image_layout(self.config, self.processor, [image.size for image in images], inputs, tokens)
        if sum(one.tokens() for one in layout) != tokens:
            raise CompatibilityError(
                f"{place}: the vision layout does not account for the {tokens} vision tokens of the row"
            )
        return layout

    def _shorten(self, sample: Sample, template: str, images: list[Any], key: str, length: int) -> Prepared:
        """Drop the last exchange, if the option allows and something is left: never a cut through an image or an answer."""
        # An unanswered question at the end goes alone, else a question goes with its answer.
        turns = sample.turns[: -1 if sample.turns[-1].role == "user" else -2]
        kept_images = sum(turn.text.count(PLACEHOLDER) for turn in turns)
        if self.limits.over_length == "skip" or not any(t.role == "assistant" for t in turns):
            raise SkipRow("over_length", f"{length} tokens, the limit is {self.limits.max_length}")
        return self._prepare(replace(sample, turns=turns), template, images[:kept_images], key)

    def _chat_owner(self) -> Any:
        return self.processor if getattr(self.processor, "chat_template", None) else self.tokenizer


def token_counter(processor: Any, config: Any, templates: Mapping[str, str]) -> Callable[[Sample], int]:
    """Counts a row's tokens, image tokens included, as capture would; may raise SkipRow. templates: part → template."""
    preparer = Preparer(processor, config, Limits(max_length=1 << 60))
    return lambda sample: len(preparer.prepare(sample, templates[sample.part]))


def render(owner: Any, tokenizer: Any, turns: Sequence[Turn], template: str) -> Rendered:
    """The row as text with the spans of its turns and answers.

    ``plain`` (LLaVA's caption phase): user text dropped, ``<image>`` + caption + newline. ``chat``: the model's own template;
    answer spans are prefix differences, so they hold for templates without generation tags; the end-of-turn token is a label,
    white space that the template writes after it is not.
    """
    if template == "plain":
        images = PLACEHOLDER * sum(turn.text.count(PLACEHOLDER) for turn in turns)
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
