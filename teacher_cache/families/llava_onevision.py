"""OneVision: LLaVA-NeXT's views, and each of several images of a row as one view, padded to a square, with one newline at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from teacher_cache.families.family import Size
from teacher_cache.families.llava_next import LlavaNext, overview_grid
from teacher_cache.records import View


class LlavaOnevision(LlavaNext):
    model_types = ("llava_onevision",)
    packs = True
    stock_class = ""

    def recognises(self, processor: Any, inputs: Mapping[str, Any]) -> bool:
        return "batch_num_images" in inputs and hasattr(processor, "_get_unpadded_features")

    def views(
        self, config: Any, processor: Any, sizes: Sequence[Size], inputs: Mapping[str, Any], tokens: int
    ) -> list[list[View]]:
        if int(inputs.get("batch_num_images", [1])[0]) == 1:
            return super().views(config, processor, sizes, inputs, tokens)
        grid = overview_grid(config, processor, inputs)
        return [[View(_padded_square(size), grid, tail=1)] for size in sizes]


def _padded_square(size: Size) -> tuple[int, int, int, int]:
    """The square around an image that is padded to its longer side, in pixels of the image: it begins before 0."""
    width, height = size
    side = max(size)
    left, top = -((side - width) // 2), -((side - height) // 2)
    return left, top, left + side, top + side


FAMILY = LlavaOnevision()
