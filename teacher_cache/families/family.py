"""What the rest of kdcli asks of a model family, and the answers for a family without a file of its own.

The generic answers come from what transformers tells of any model: attributes of its processor and configuration, names of its modules.
A family overrides what is different in it. Head transforms (scale, soft cap) are read off each model's own forward
(``teachers/head_form.py``) and need no answer here.

Shapes: T tokens of a row's expanded sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from teacher_cache.errors import CompatibilityError
from teacher_cache.records import View

Size = tuple[int, int]
TYPICAL = (480, 640)
"""(height, width) of a photograph, as mixtures are full of them."""


class Family:
    """One model family; subclasses override attributes and methods.

    Attributes:
        model_types: ``model_type`` of the configurations that this family answers for.
        token_kinds: name of an input of the model, int64 ``[1, T]``: 1 at image tokens, 0 at text. It is given to models whose processor
            names it (M-RoPE of Qwen-VL counts positions by it).
        embeds_image_token: whether the model looks an image token up in its embedding before it puts vision features there.
        language_models: attributes under which the model without its head keeps its language model, in the order of trying.
        modules: module group → names in a parameter's path; the first group counts, so a projector inside the vision module is one.
        stock_class: class of transformers whose projector a compressor can stand for; "": compressors are refused.
        packs_views: an image is several views, each of which is compressed before they are packed.
        packs: samples in one row are kept apart by their positions alone, those of images too (tests/families/test_packing.py).
        between_marks: an image is several runs of vision tokens with text between them, which token removal cannot tell from images.
    """

    model_types: tuple[str, ...] = ()
    token_kinds = "mm_token_type_ids"
    embeds_image_token = True
    language_models: tuple[str, ...] = ("language_model", "text_model")
    modules: Mapping[str, tuple[str, ...]] = {
        "projector": ("multi_modal_projector", "connector", "merger", "image_newline"),
        "language_model": ("language_model", "text_model", "lm_head"),
        "vision_tower": ("vision_tower", "visual", "vision_model"),
    }
    stock_class = ""
    packs_views = False
    packs = False
    between_marks = False

    def packed_positions(self, model: Any, batch: Any) -> torch.Tensor:
        """``position_ids`` of a batch of packed samples (``collate`` with places), as the model takes them: from 0 in every sample."""
        return batch.inputs["position_ids"]

    def recognises(self, processor: Any, inputs: Mapping[str, Any]) -> bool:
        """Whether images are cut as in this family, by what the processor has and hands over. So a new model with a known processor needs
        no file."""
        return False

    def views(
        self, config: Any, processor: Any, sizes: Sequence[Size], inputs: Mapping[str, Any], tokens: int
    ) -> list[list[View]]:
        """Views of every image of a row, in token order. Here: one view an image; of an unknown grid, tokens in order in one row.

        Args:
            processor: one whose model has fewer tokens than patches says their (rows, columns) a view as ``vision_grid``.
            sizes: original (width, height) of each image. inputs: the processor's tensors. tokens: vision tokens of the whole row.

        Raises:
            CompatibilityError: tiles of a family that is not known.
        """
        if getattr(inputs.get("pixel_values"), "ndim", 0) == 5:
            raise CompatibilityError(
                f"family {config.model_type} cuts images into tiles in a way that is not known here: not supported"
            )
        per_image, rest = divmod(tokens, len(sizes))
        grid = getattr(processor, "vision_grid", None) or _patch_grid(config, inputs)
        if grid is None and math.isqrt(per_image) ** 2 == per_image:
            grid = (math.isqrt(per_image),) * 2
        if rest or grid is None or grid[0] * grid[1] != per_image:
            grid = (1, per_image)
        return [[View(_crop(processor.image_processor, size), grid)] for size in sizes]

    def typical_tokens(self, config: Any, processor: Any) -> int:
        """Vision tokens of a photograph, for estimates: what the processor says, else one a patch."""
        try:
            return int(processor._get_num_multimodal_tokens([TYPICAL]).num_image_tokens[0])
        except (AttributeError, TypeError, ValueError, KeyError, NotImplementedError):
            vision = config.vision_config
            image, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
            return (image // patch) ** 2 if isinstance(image, int) and isinstance(patch, int) and patch else 576

    def image_arguments(self, processor: Any) -> dict[str, Any]:
        """Further keywords of the processor's call, beside images: settings of the folder that it does not follow by itself."""
        return {}

    def lists_every_text(self, processor: Any) -> bool:
        """Whether the processor wants a list of images for each text of a batch, an empty one for a text without."""
        return hasattr(processor, "image_seq_len")

    def compressible(self, config: Any) -> bool:
        """Whether views are square grids of patches before a projector that a compressor can stand for."""
        return bool(self.stock_class) and config.vision_config.model_type != "pixtral"

    def decoder(self, model: Any) -> Any:
        """The model without its head, whose last hidden states the head reads: ``model.model``, or whatever its architecture calls it
        (``transformer`` of GPT-2); None where there is none."""
        for name in ("model", getattr(model, "base_model_prefix", "")):
            if name and isinstance(inner := getattr(model, name, None), nn.Module):
                return inner
        return None

    def language_model(self, base: Any) -> Any:
        """The language model inside of a model without its head; itself where it reads text alone. AttributeError: none has layers."""
        for name in self.language_models:
            if hasattr(getattr(base, name, None), "layers"):
                return getattr(base, name)
        if hasattr(base, "layers"):
            return base
        raise AttributeError(f"{type(base).__name__} has no language_model with layers")


def tiles_and_whole(size: Size, rows: int, columns: int, grid: Size) -> list[View]:
    """So many tiles row by row, which together are the image, and behind them the whole image where there are several."""
    width, height = size
    boxes = [
        (x * width // columns, y * height // rows, (x + 1) * width // columns, (y + 1) * height // rows)
        for y in range(rows)
        for x in range(columns)
    ]
    return [View(box, grid) for box in ([*boxes, (0, 0, width, height)] if len(boxes) > 1 else boxes)]


def _patch_grid(config: Any, inputs: Mapping[str, Any]) -> Size | None:
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
