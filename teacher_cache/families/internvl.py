"""InternVL: tiles row by row, and behind them the whole image where there are several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from teacher_cache.families.family import Family, Size, tiles_and_whole
from teacher_cache.records import View


class InternVL(Family):
    model_types = ("internvl",)
    packs = True

    def recognises(self, processor: Any, inputs: Mapping[str, Any]) -> bool:
        return hasattr(processor, "image_seq_length") and hasattr(processor.image_processor, "crop_to_patches")

    def views(
        self, config: Any, processor: Any, sizes: Sequence[Size], inputs: Mapping[str, Any], tokens: int
    ) -> list[list[View]]:
        side = math.isqrt(processor.image_seq_length)
        views = [_tiles(processor.image_processor, size, (side, side)) for size in sizes]
        if sum(len(one) for one in views) != len(inputs["pixel_values"]):
            return [[View((0, 0, *size), (side, side))] for size in sizes]  # cutting into tiles is switched off
        return views


def _tiles(images: Any, size: Size, grid: Size) -> list[View]:
    # What decides the tiles stands beside the image processor's class, and is no method of it.
    canvas = import_module(type(images).__module__).get_optimal_tiled_canvas
    tile = images.size["height"], images.size["width"]
    columns, rows = canvas((size[1], size[0]), tile, images.min_patches, images.max_patches)
    return tiles_and_whole(size, rows, columns, grid)


FAMILY = InternVL()
