"""Rows whose tokens are known already: no chat template, no tokenizer (slow twin: ``Preparer.prepare``).

``samples`` holds what a row became when it was captured. A student with the teacher's tokenizer and chat template would render and tokenise
it to the same tokens again, in every epoch of every run; only its images are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from teacher_cache.preparing.pixels import PlainPixels, is_plain
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Prepared, Sample, TextTokens

PROOFS = 8
"""Rows with images that are prepared both ways before the short way is trusted; another family's processor may do more than count."""


def same_text_side(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two ``Preparer.fingerprint`` turn every row into the same text tokens."""
    return all(ours.get(name) == theirs.get(name) for name in ("tokenizer", "chat_template", "version", "first_token"))


class KnownText:
    """``prepare`` as a ``Preparer`` does it, from stored tokens.

    Args:
        preparer: of a model whose text side is that of the tokens (``same_text_side``).
    """

    def __init__(self, preparer: Preparer, proofs: int = PROOFS):
        self.preparer = preparer
        self._left, self._trusted = proofs, True
        images = preparer.processor.image_processor
        self._image_inputs: Any = None  # of a model that reads text alone
        if images is not None:
            self._image_inputs = PlainPixels(images) if is_plain(images) else partial(images, return_tensors="pt")

    def prepare(self, sample: Sample, text: TextTokens, key: str, template: str, max_image_pixels: int) -> Prepared:
        """As ``Preparer.prepare``; text, key: of the row as it is stored."""
        if not self._trusted or (sample.images and self._left):
            slow = self.preparer.prepare(sample, template, max_image_pixels)
            if self._trusted:
                self._trusted = _equal(slow, self._from_tokens(sample, text, key, max_image_pixels))
                self._left -= 1
            return slow
        fast = self._from_tokens(sample, text, key, max_image_pixels)
        if fast is None or len(fast) > self.preparer.limits.max_length:
            return self.preparer.prepare(sample, template, max_image_pixels)  # what is too long is cut or refused there
        return fast

    def _from_tokens(self, sample: Sample, text: TextTokens, key: str, max_image_pixels: int) -> Prepared | None:
        """None where the processor gives no plain row of image tokens for an image."""
        images = self.preparer.decode(sample, max_image_pixels)
        if len(images) != len(text.image_at):
            return None
        try:
            pixels, counts = self._pixels(images)
        except MemoryError:
            raise
        except Exception:  # of whatever kind: the slow way says what is wrong, or gets through
            return None
        ids = text.ids.to(torch.int64)
        pieces, before = [], 0
        for at, count in zip(text.image_at, counts):
            pieces += [ids[before:at], torch.full((count,), self.preparer.image_token_id)]
            before = at
        input_ids = torch.cat([*pieces, ids[before:]])
        return self.preparer.assemble(sample, key, input_ids, text, images, pixels)

    def _pixels(self, images: list[Any]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """(what the model reads of the images, image tokens of each); ValueError where an image is more than image tokens."""
        if not images:
            return {}, []
        processor = self.preparer.processor
        given: list[Any] = (
            images if isinstance(self._image_inputs, PlainPixels) else [images]
        )  # as Preparer gives a row's
        inputs = dict(self._image_inputs(given))
        said = [processor.replace_image_token(inputs, image_idx=number) for number in range(len(images))]
        token = str(self.preparer.image_token)
        counts = [one.count(token) for one in said]
        if any(one != token * count for one, count in zip(said, counts)):
            raise ValueError("an image's placeholder holds text")
        unused = set(getattr(processor, "unused_input_names", ()))
        return {name: value for name, value in inputs.items() if name not in unused}, counts


def _equal(slow: Prepared, fast: Prepared | None) -> bool:
    if fast is None or slow.layout != fast.layout or set(slow.pixels) != set(fast.pixels):
        return False
    names = ("input_ids", "vision_positions", "text_positions", "response_rows", "labels")
    same = all(torch.equal(getattr(slow, name), getattr(fast, name)) for name in names)
    same = same and all(
        torch.equal(getattr(slow.text, n), getattr(fast.text, n)) for n in ("ids", "role", "turn", "response")
    )
    return same and all(torch.equal(slow.pixels[name], fast.pixels[name]) for name in slow.pixels)
