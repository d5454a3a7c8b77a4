"""Idefics 3 and SmolVLM: the image at its longest edge, stretched to whole tiles, each between marks; behind them the whole image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from teacher_cache.families.family import Family, Size, tiles_and_whole
from teacher_cache.records import View


class Idefics3(Family):
    model_types = ("idefics3", "smolvlm")
    packs = True
    between_marks = True

    def recognises(self, processor: Any, inputs: Mapping[str, Any]) -> bool:
        return hasattr(processor, "image_seq_len") and hasattr(processor.image_processor, "max_image_size")

    def views(
        self, config: Any, processor: Any, sizes: Sequence[Size], inputs: Mapping[str, Any], tokens: int
    ) -> list[list[View]]:
        return [_split(processor, size) for size in sizes]


def _split(processor: Any, size: Size) -> list[View]:
    """The processor's own count (``get_number_of_image_patches``) stretches the shorter edge by itself, which is another number of rows
    now and then."""
    images, side = processor.image_processor, math.isqrt(processor.image_seq_len)
    whole = [View((0, 0, *size), (side, side))]
    if not images.do_image_splitting:
        return whole
    resized = import_module(type(images).__module__).get_resize_output_image_size
    height, width = resized(torch.empty(3, size[1], size[0], device="meta"), images.size["longest_edge"])
    tile = images.max_image_size["longest_edge"]
    # The longer edge is stretched to whole tiles; the shorter one follows it, in whole pixels, and is stretched in its turn.
    if width >= height:
        columns = math.ceil(width / tile)
        rows = math.ceil(int(columns * tile / (width / height)) / tile)
    else:
        rows = math.ceil(height / tile)
        columns = math.ceil(int(rows * tile * (width / height)) / tile)
    return tiles_and_whole(size, rows, columns, (side, side)) if rows * columns > 1 else whole


FAMILY = Idefics3()
