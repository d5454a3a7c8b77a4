"""Gemma 3: a square grid a view, each between marks; with pan and scan the whole image and crops of it along its longer side.

- ``token_type_ids``: the tokens of one view look at each other in both directions, so a vision row is not causal inside its view.
- Pan and scan is on where the folder's image processor says ``"do_pan_and_scan": true`` (published folders do not). transformers' own
  processor does not look there, so its call is told.
- The image token of templates (``<start_of_image>``) is a mark, the one that is repeated (``<image_soft_token>``) another, which may have
  no row in the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from teacher_cache.families.family import TYPICAL, Family, Size
from teacher_cache.records import View

SWITCH = "do_pan_and_scan"
LIMITS = ("pan_and_scan_min_crop_size", "pan_and_scan_max_num_crops", "pan_and_scan_min_ratio_to_activate")


class Gemma3(Family):
    model_types = ("gemma3",)
    token_kinds = "token_type_ids"
    embeds_image_token = False
    between_marks = True

    def views(
        self, config: Any, processor: Any, sizes: Sequence[Size], inputs: Mapping[str, Any], tokens: int
    ) -> list[list[View]]:
        side = math.isqrt(processor.image_seq_length)
        return [[View(box, (side, side)) for box in boxes(processor, size)] for size in sizes]

    def typical_tokens(self, config: Any, processor: Any) -> int:
        return int(processor.image_seq_length) * len(boxes(processor, (TYPICAL[1], TYPICAL[0])))

    def image_arguments(self, processor: Any) -> dict[str, Any]:
        given = settings(processor)
        return {"images_kwargs": given} if given[SWITCH] else {}

    def lists_every_text(self, processor: Any) -> bool:
        return True


def settings(processor: Any) -> dict[str, Any]:
    """Pan and scan as the folder's image processor says it, else as the processor's class does."""
    own = {name: getattr(processor.image_processor, name, None) for name in (SWITCH, *LIMITS)}
    return {**processor.images_kwargs, **{name: value for name, value in own.items() if value is not None}}


def boxes(processor: Any, size: Size) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of the whole image, then of its crops, as the image processor itself cuts them."""
    width, height = size
    given, whole = settings(processor), (0, 0, width, height)
    if not given[SWITCH]:
        return [whole]
    images = processor.image_processor
    crops = getattr(images, "pan_and_scan_batched", None) or images.pan_and_scan  # of torchvision, of Pillow
    found = [whole]
    for crop in crops(torch.empty(3, height, width, device="meta"), **{name: given[name] for name in LIMITS}):
        top, left = divmod(crop.storage_offset(), width)
        found.append((left, top, left + crop.shape[2], top + crop.shape[1]))
    return found


FAMILY = Gemma3()
