"""A row as tokens and pixels, for any model: text by a template, images, label mask, vision layout.

Two conventions are stated here once. Response rows are *shifted*: the row at position t-1 predicts the token at t.
Vision rows are *not* shifted: they are taken at the vision token itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import PIL.Image
import torch

from teacher_cache.errors import CompatibilityError, KdcliError, SkipSample, refusing_row
from teacher_cache.families import family_of
from teacher_cache.preparing.chat import Chat
from teacher_cache.preparing.fingerprint import PREPARATION, preparation_version, processor_fingerprint
from teacher_cache.preparing.layout import image_layout
from teacher_cache.preparing.pixels import check_resized
from teacher_cache.preparing.rendering import Rendered, expanded, image_text
from teacher_cache.preparing.templates import TEMPLATES, check_tokens, find_template
from teacher_cache.preparing.token_rows import check_token_ids, embedding_rows
from teacher_cache.records import ROLES, ImageLayout, Prepared, Sample, TextTokens, Turn
from teacher_cache.sources.usable_samples import PLACEHOLDER, check_turns, decode_image, row_key

NO_TOKEN = -1
"""In place of the id of an image token: no token has it."""


@dataclass(frozen=True)
class Limits:
    """max_length: tokens with placeholders expanded. over_length: ``skip`` the row, or ``cut`` it at a turn border."""

    max_length: int = 2048
    over_length: str = "skip"

    def __post_init__(self) -> None:
        if self.over_length not in ("skip", "cut"):
            raise KdcliError(f"over_length must be skip or cut, got {self.over_length!r}")


class Preparer:
    """Turns rows into what one model reads.

    Args:
        processor: the model's ``AutoProcessor``, or a ``TextProcessor``. config: its configuration (image token id, patch size).
        version: ``PREPARATION``; an earlier one for the rows of a cache that was made by it (``like``).
    """

    def __init__(self, processor: Any, config: Any, limits: Limits = Limits(), version: int = PREPARATION):
        self.processor, self.config, self.limits, self.version = processor, config, limits, version
        self.tokenizer = processor.tokenizer
        self.chat = Chat(processor, version)
        self.upright = version > 1
        self.reads_images = processor.image_processor is not None
        self.image_token_id = int(config.image_token_id) if self.reads_images else NO_TOKEN
        self._text_alone: set[str] = set()
        """Templates of which a row without images was seen to become what the tokenizer alone says: no processor is asked again."""
        self._family = family_of(config)
        self._tells_kinds = self._family.token_kinds in getattr(processor, "model_input_names", ())
        self._reserved: dict[str, re.Pattern[str] | None] = {}
        """By template that was checked: what no row may hold."""
        check_token_ids(self.tokenizer, config)
        self._embedding_rows = embedding_rows(config)
        if self.reads_images and self.image_token is None:
            raise CompatibilityError(
                f"image token id {self.image_token_id} is not in the tokenizer: not this model's processor"
            )

    @property
    def image_token(self) -> str | None:
        """None of a model that reads text alone."""
        return self.tokenizer.convert_ids_to_tokens(self.image_token_id) if self.reads_images else None

    @classmethod
    def like(
        cls, preparation: Mapping[str, Any], processor: Any, config: Any, max_length: int | None = None
    ) -> Preparer:
        """Prepares as the rows of a cache were, a student's too. preparation: of its plan. max_length: another limit of tokens."""
        limits = Limits(max_length or preparation["max_length"], preparation["over_length"])
        return cls(processor, config, limits, preparation_version(preparation))

    def fingerprint(self) -> dict[str, Any]:
        """What decides how rows become tokens and pixels, JSON-able. Version 1 had no number."""
        return {
            **processor_fingerprint(self.processor),
            "max_length": self.limits.max_length,
            "over_length": self.limits.over_length,
            **({"version": self.version, "first_token": self._adds_first()} if self.version > 1 else {}),
        }

    def prepare(self, sample: Sample, template: str = "chat", max_image_pixels: int = 89_478_485) -> Prepared:
        """Tokens, pixels and row positions of one row; SkipSample with a reason where the row cannot be used."""
        check_turns(sample)
        return self._prepare(sample, template, self.decode(sample, max_image_pixels), row_key(sample))

    def decode(self, sample: Sample, max_image_pixels: int) -> list[Any]:
        """The row's images as RGB; SkipSample for one that cannot be used, or grows beyond the limit in the processor, and for all of a row
        that the model reads no images of."""
        if not self.reads_images:
            if sample.images:
                raise SkipSample("images_unread", f"{len(sample.images)} images, and the model is text-only")
            return []
        images = [decode_image(image, max_image_pixels, self.upright) for image in sample.images]
        check_resized(self.processor.image_processor, images, max_image_pixels)
        return images

    def _adds_first(self) -> bool:
        """Whether a chat gets the tokenizer's own first token: it depends on where a model keeps its template."""
        return self.chat.begins("") and bool(self.tokenizer("")["input_ids"])

    def check_template(self, template: str) -> None:
        """Before any row is read: CompatibilityError or KdcliError where ``template`` cannot be used with this model."""
        if template == "chat":
            self.chat.check()
        turns = tuple(Turn(role, f"{role} {number}") for number in (1, 2) for role in ("user", "assistant"))
        with suppress(SkipSample):  # a probe over the length limit says nothing about the template
            self._prepare(Sample("", 0, "", "a probe row", turns), template, [], "probe")

    def check_images(self, part: str, template: str) -> None:
        """Before a job whose part ``part`` has images: CompatibilityError where no row with an image can become tokens and pixels. Of a
        model that reads text alone such rows are skipped, and that is no error of the model's."""
        if not self.reads_images:
            return
        try:
            if template == "chat":
                self.chat.check(images=True)
            turns = (Turn("user", f"{PLACEHOLDER}\nWhat is this?"), Turn("assistant", "A fact."))
            self._prepare(Sample("", 0, "", "a probe row", turns), template, [PIL.Image.new("RGB", (64, 64))], "probe")
        except SkipSample as skip:
            # How long a row is depends on its image; a template may want a system turn, and was tried above.
            if skip.reason not in ("over_length", "template_refused"):
                raise CompatibilityError(f"part {part}: no row with an image can be used: {skip.detail}") from None
        except CompatibilityError as error:
            raise CompatibilityError(f"part {part}: {error}") from None

    def _prepare(self, sample: Sample, template: str, images: list[Any], key: str) -> Prepared:
        special = self._reserved_by(template)
        if special and (found := next(filter(None, (special.search(t.text) for t in sample.turns)), None)):
            raise SkipSample("reserved_token", f"the text holds {found.group()!r}, which the tokenizer reserves")
        image = self._image_text if template == "plain" else PLACEHOLDER
        rendered = find_template(template).render(self.chat, sample.turns, image)
        text = self._tokenize(rendered)
        input_ids = text.ids.to(torch.int64)
        inputs: dict[str, torch.Tensor] = {}
        if images or template not in self._text_alone:
            inputs, replaced = self._expand(rendered, images)
            input_ids = inputs.pop("input_ids")[0].to(torch.int64)
            if not torch.equal(input_ids[input_ids != self.image_token_id].to(torch.uint32), text.ids):
                # The processor writes text of its own around an image.
                text = self._tokenize(expanded(rendered, replaced))
            if not torch.equal(input_ids[input_ids != self.image_token_id].to(torch.uint32), text.ids):
                raise CompatibilityError(
                    f"{sample.place}: the processor's expansion changes text tokens; this family is not supported"
                )
            self._check_kinds(inputs, input_ids, sample.place)
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
        if len(text.ids) and (highest := int(text.ids.to(torch.int64).max())) >= self._embedding_rows:
            token = f"{self.tokenizer.convert_ids_to_tokens(highest)!r} (id {highest})"
            raise SkipSample(
                "unknown_token", f"{token} is beyond the {self._embedding_rows} rows of the model's embedding"
            )
        is_vision = input_ids == self.image_token_id
        text_positions = torch.nonzero(~is_vision).flatten()
        layout = self._layout(images, pixels, int(is_vision.sum()))
        if self._tells_kinds:
            pixels = {**pixels, self._family.token_kinds: is_vision[None].to(torch.int64)}
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
            layout=layout,
            pixels=pixels,
            turns=len(sample.turns),
            images=sample.images[: len(images)],
            upright=self.upright,
        )

    def _tokenize(self, rendered: Rendered) -> TextTokens:
        """Tokens of the text without the images, each with its turn, role and label flag, by character offsets."""
        with refusing_row("the tokenizer refuses the row"):
            encoded = self.tokenizer(rendered.text, add_special_tokens=rendered.begins, return_offsets_mapping=True)
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
        images = np.flatnonzero(~is_text)
        if rendered.images and not len(images):
            raise CompatibilityError(
                f"the processor writes no {self.image_token} for an image: not this model's processor"
            )
        if rendered.images is not None:  # the first image token of each
            images = images[np.searchsorted(spans[images, 0], rendered.images)]
        image_at = tuple(np.cumsum(is_text)[images].tolist())
        ids_N, role_N, turn_N, response_N = map(torch.from_numpy, columns)
        return TextTokens(ids_N, role_N, turn_N, response_N, image_at)

    def _expand(self, rendered: Rendered, images: list[Any]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """(the processor's tensors, what it wrote in place of each image: ``span`` in the text, ``replacement``)"""
        given: dict[str, Any] = {"text": [rendered.text], "return_tensors": "pt", "add_special_tokens": rendered.begins}
        if images:
            # A list in a list: the images of one row (OneVision sees several images of a row otherwise than one).
            given |= {"images": [images], "return_text_replacement_offsets": True}
            given |= self._family.image_arguments(self.processor)
        with refusing_row("the processor refuses the row"):
            inputs = dict(self.processor(**given))
        inputs.pop("attention_mask", None)
        replaced = inputs.pop("text_replacement_offsets", [[]])
        return inputs, replaced[0] if replaced else []

    def _check_kinds(self, inputs: dict[str, torch.Tensor], input_ids: torch.Tensor, place: str) -> None:
        """Takes the kinds of tokens out of ``inputs``: ``assemble`` makes them, for stored tokens as well."""
        kinds = inputs.pop(self._family.token_kinds, None)
        if kinds is not None and not torch.equal(kinds[0] == 1, input_ids == self.image_token_id):
            raise CompatibilityError(
                f"{place}: the processor counts other tokens than image tokens to its images; this family is not supported"
            )
        for name, value in inputs.items():
            if tuple(getattr(value, "shape", ())) == (1, len(input_ids)):
                raise CompatibilityError(
                    f"{place}: the processor says {name} for every token, which is unknown: this family is not supported"
                )

    @cached_property
    def _image_text(self) -> str:
        return image_text(self.chat.owner, self.chat.image)

    def _layout(self, images: list[Any], inputs: Mapping[str, Any], tokens: int) -> tuple[ImageLayout, ...]:
        """SkipSample where nothing known here, or nothing that losses could look at, comes of the images."""
        if not images:
            return ()
        sizes = [image.size for image in images]
        told = ", ".join(f"{width} × {height}" for width, height in sizes)
        with refusing_row(f"its images have an unknown vision layout ({told} pixels)"):
            layout = image_layout(self.config, self.processor, sizes, inputs, tokens)
        if any(0 in view.grid for one in layout for view in one.views):
            raise SkipSample(
                "processor_refused", f"an image is so narrow that a view of it keeps no patch ({told} pixels)"
            )
        if sum(one.tokens() for one in layout) != tokens:
            # Where the family is unknown this is so in every row, and a capture that skips nearly all of them stops.
            raise SkipSample(
                "processor_refused",
                f"the vision layout does not account for the {tokens} vision tokens of its images ({told} pixels)",
            )
        return layout

    def _shorten(self, sample: Sample, template: str, images: list[Any], key: str, length: int) -> Prepared:
        """Drop the last exchange, if the option allows and something is left: never a cut through an image or an answer."""
        # An unanswered question at the end goes alone, else a question goes with its answer.
        turns = sample.turns[: -1 if sample.turns[-1].role == "user" else -2]
        kept_images = sum(turn.text.count(PLACEHOLDER) for turn in turns)
        if self.limits.over_length == "skip" or not any(t.role == "assistant" for t in turns):
            raise SkipSample("over_length", f"{length} tokens, the limit is {self.limits.max_length}")
        return self._prepare(replace(sample, turns=turns), template, images[:kept_images], key)

    def _reserved_by(self, template: str) -> re.Pattern[str] | None:
        """Checks the template's own tokens the first time that it is used."""
        if template not in self._reserved:
            check_tokens(template, self.tokenizer, self.image_token)
            reserved = {*self.tokenizer.all_special_tokens, *TEMPLATES[template].tokens} - {PLACEHOLDER}
            self._reserved[template] = re.compile("|".join(map(re.escape, sorted(reserved)))) if reserved else None
        return self._reserved[template]
