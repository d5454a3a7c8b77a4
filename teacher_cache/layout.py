"""Where vision tokens come from: views, crop boxes and token grids of an image.

Families are told apart by what their processors hand to the model, not by name: a grid an image (``image_grid_thw``), an overview and
tiles (``image_sizes``), tiles as images of their own (``crop_to_patches``), tiles between marks (``max_image_size``), or one view. The
caller holds the sum of tokens against the row's, so that a family that does otherwise is refused and never read wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from teacher_cache.errors import CompatibilityError
from teacher_cache.records import ImageLayout, View

COMPRESSED = "kdcli_compressor"
"""Entry in the configuration of a student whose projector leaves fewer vision tokens than patches (student_train/compression.py)."""
Size = tuple[int, int]
TYPICAL = (480, 640)
"""(height, width) of a photograph, as mixtures are full of them."""


def image_layout(
    config: Any, processor: Any, sizes: Sequence[Size], inputs: Mapping[str, Any], tokens: int
) -> tuple[ImageLayout, ...]:
    """Layout of every image of a row.

    Args:
        processor: one whose model has fewer tokens than patches says their (rows, columns) a view as ``vision_grid``.
        sizes: original (width, height) of each image. inputs: the processor's tensors. tokens: vision tokens of the whole row.

    Raises:
        CompatibilityError: tiles of a family that is not known here.
    """
    if "image_grid_thw" in inputs:
        views = [_merged(processor, size, thw) for size, thw in zip(sizes, inputs["image_grid_thw"].tolist())]
    elif "image_sizes" in inputs and hasattr(processor, "_get_unpadded_features"):
        views = _anyres(config, processor, sizes, inputs)
    elif hasattr(processor, "image_seq_length") and hasattr(processor.image_processor, "crop_to_patches"):
        views = _tiled(processor, sizes, inputs)
    elif hasattr(processor, "image_seq_len") and hasattr(processor.image_processor, "max_image_size"):
        views = [_split(processor, size) for size in sizes]
    elif getattr(inputs.get("pixel_values"), "ndim", 0) == 5:
        raise CompatibilityError(
            f"family {config.model_type} cuts images into tiles in a way that is not known here: not supported"
        )
    else:
        views = _single(config, processor, sizes, inputs, tokens)
    return tuple(ImageLayout(size, tuple(of_image)) for size, of_image in zip(sizes, views))


def typical_tokens(config: Any, processor: Any) -> int:
    """Vision tokens of a photograph, for estimates: what the processor says, else one a patch; 0 of a model that reads text alone."""
    if processor.image_processor is None:
        return 0
    try:
        return int(processor._get_num_multimodal_tokens([TYPICAL]).num_image_tokens[0])
    except (AttributeError, TypeError, ValueError, KeyError, NotImplementedError):
        vision = config.vision_config
        image, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
        return (image // patch) ** 2 if isinstance(image, int) and isinstance(patch, int) and patch else 576


def _merged(processor: Any, size: Size, thw: Sequence[int]) -> list[View]:
    """Qwen-VL: the whole image at its own shape, ``merge_size``² patches a token."""
    merge = processor.image_processor.merge_size
    return [View((0, 0, *size), (thw[1] // merge, thw[2] // merge))]


def _anyres(config: Any, processor: Any, sizes: Sequence[Size], inputs: Mapping[str, Any]) -> list[list[View]]:
    """LLaVA-NeXT and OneVision: an overview, then all tiles as one grid without the padding's rows or columns, a newline a row.

    Both views show the whole image; cells at the grid's border may reach into the padding. An image among several of a OneVision row
    is one view, padded to a square, with one newline at its end. Of a very long image nothing but padding may be left: no rows,
    or no columns.
    """
    from transformers.image_processing_utils import select_best_resolution

    pixels = inputs["pixel_values"]
    height, width = pixels.shape[-2:]
    patch = config.vision_config.patch_size
    side = getattr(processor, "vision_grid", None) or (height // patch, width // patch)
    if int(inputs.get("batch_num_images", [1])[0]) > 1:
        return [[View(_padded_square(size), side, tail=1)] for size in sizes]
    views = []
    for size in sizes:
        shape = size[1], size[0]
        tall, wide = select_best_resolution(shape, processor.image_processor.image_grid_pinpoints)
        # The processor's own count: the model's unpadding (and OneVision's shrinking of what is beyond its limit) rounds alike.
        patches, rows = processor._get_unpadded_features(*shape, *side, tall // height, wide // width)
        views.append([View((0, 0, *size), side), View((0, 0, *size), (rows, patches // max(1, rows)), newline=True)])
    return views


def _padded_square(size: Size) -> tuple[int, int, int, int]:
    """The square around an image that is padded to its longer side, in pixels of the image: it begins before 0."""
    width, height = size
    side = max(size)
    left, top = -((side - width) // 2), -((side - height) // 2)
    return left, top, left + side, top + side


def _tiled(processor: Any, sizes: Sequence[Size], inputs: Mapping[str, Any]) -> list[list[View]]:
    """InternVL: tiles row by row, and behind them the whole image where there are several."""
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
    return _cut(size, rows, columns, grid)


def _cut(size: Size, rows: int, columns: int, grid: Size) -> list[View]:
    """So many tiles row by row, which together are the image, and behind them the whole image where there are several."""
    width, height = size
    boxes = [
        (x * width // columns, y * height // rows, (x + 1) * width // columns, (y + 1) * height // rows)
        for y in range(rows)
        for x in range(columns)
    ]
    return [View(box, grid) for box in ([*boxes, (0, 0, width, height)] if len(boxes) > 1 else boxes)]


def _split(processor: Any, size: Size) -> list[View]:
    """Idefics 3 and SmolVLM: the image at its longest edge, stretched to whole tiles. The processor's own count
    (``get_number_of_image_patches``) stretches the shorter edge by itself, which is another number of rows now and then."""
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
    return _cut(size, rows, columns, (side, side)) if rows * columns > 1 else whole


def _single(
    config: Any, processor: Any, sizes: Sequence[Size], inputs: Mapping[str, Any], tokens: int
) -> list[list[View]]:
    """LLaVA-1.5: one view an image. Of a family whose grid we do not know: tokens in order, one row."""
    per_image, rest = divmod(tokens, len(sizes))
    grid = getattr(processor, "vision_grid", None) or _square(config, inputs)
    if grid is None and math.isqrt(per_image) ** 2 == per_image:
        grid = (math.isqrt(per_image),) * 2
    if rest or grid is None or grid[0] * grid[1] != per_image:
        grid = (1, per_image)
    return [[View(_crop(processor.image_processor, size), grid)] for size in sizes]


def _square(config: Any, inputs: Mapping[str, Any]) -> Size | None:
    """Patch grid of a one-view model: pixels over patch size."""
    pixels, patch = inputs.get("pixel_values"), getattr(config.vision_config, "patch_size", None)
    if pixels is None or pixels.ndim != 4 or not isinstance(patch, int):
        return None
    return pixels.shape[2] // patch, pixels.shape[3] // patch


def _crop(image_processor: Any, size: Size) -> tuple[int, int, int, int]:
    """The part of the original that the view shows: a centred square where the processor crops (CLIP), else everything."""
    width, height = size
    if not getattr(image_processor, "do_center_crop", False):
        return 0, 0, width, height
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
