"""Where vision tokens come from: views, crop boxes and token grids of an image, per model family."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from teacher_cache.records import ImageLayout, View

COMPRESSED = "kdcli_compressor"
"""Entry in the configuration of a student whose projector leaves fewer vision tokens than patches (student_train/compression.py)."""


def image_layout(
    config: Any, processor: Any, sizes: Sequence[tuple[int, int]], inputs: Mapping[str, Any], tokens: int
) -> tuple[ImageLayout, ...]:
    """Layout of every image of a row.

    Args:
        processor: one whose model has fewer tokens than patches says their (rows, columns) as ``vision_grid``.
        sizes: original (width, height) of each image. inputs: the processor's tensors. tokens: vision tokens of the whole row.
    """
    per_image, rest = divmod(tokens, len(sizes))
    grid = getattr(processor, "vision_grid", None) or _square(config, inputs)
    if grid is None and math.isqrt(per_image) ** 2 == per_image:
        grid = (math.isqrt(per_image),) * 2
    if rest or grid is None or grid[0] * grid[1] != per_image:
        grid = (1, per_image)  # a family whose grid we do not know: tokens in order, one row
    return tuple(ImageLayout(size, (View(_crop(processor.image_processor, size), grid),)) for size in sizes)


def _square(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Patch grid of a one-view model (LLaVA-1.5): pixels over patch size."""
    pixels, patch = inputs.get("pixel_values"), getattr(config.vision_config, "patch_size", None)
    if pixels is None or pixels.ndim != 4 or not isinstance(patch, int):
        return None
    return pixels.shape[2] // patch, pixels.shape[3] // patch


def _crop(image_processor: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of the original that the view shows: a centred square where the processor crops (CLIP), else everything."""
    width, height = size
    if not getattr(image_processor, "do_center_crop", False):
        return 0, 0, width, height
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
