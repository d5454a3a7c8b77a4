"""LLaVA-NeXT: an overview, then all tiles as one grid without the padding's rows or columns, a newline a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from teacher_cache.families.family import Family, Size
from teacher_cache.records import View


class LlavaNext(Family):
    model_types: tuple[str, ...] = ("llava_next",)
    packs = True
    stock_class = "LlavaNextForConditionalGeneration"
    packs_views = True

    def recognises(self, processor: Any, inputs: Mapping[str, Any]) -> bool:
        return "image_sizes" in inputs and hasattr(processor, "_get_unpadded_features") and not _counts_images(inputs)

    def views(
        self, config: Any, processor: Any, sizes: Sequence[Size], inputs: Mapping[str, Any], tokens: int
    ) -> list[list[View]]:
        """Both views show the whole image; cells at the grid's border may reach into the padding. Of a very long image nothing but padding
        may be left: no rows, or no columns."""
        from transformers.image_processing_utils import select_best_resolution

        height, width = inputs["pixel_values"].shape[-2:]
        side = overview_grid(config, processor, inputs)
        views = []
        for size in sizes:
            shape = size[1], size[0]
            tall, wide = select_best_resolution(shape, processor.image_processor.image_grid_pinpoints)
            # The processor's own count: the model's unpadding (and OneVision's shrinking of what is beyond its limit) rounds alike.
            patches, rows = processor._get_unpadded_features(*shape, *side, tall // height, wide // width)
            tiles = View((0, 0, *size), (rows, patches // max(1, rows)), newline=True)
            views.append([View((0, 0, *size), side), tiles])
        return views


def overview_grid(config: Any, processor: Any, inputs: Mapping[str, Any]) -> Size:
    """(rows, columns) of vision tokens of one tile, and of the overview."""
    height, width = inputs["pixel_values"].shape[-2:]
    patch = config.vision_config.patch_size
    return getattr(processor, "vision_grid", None) or (height // patch, width // patch)


def _counts_images(inputs: Mapping[str, Any]) -> bool:
    """As OneVision does."""
    return "batch_num_images" in inputs


FAMILY = LlavaNext()
