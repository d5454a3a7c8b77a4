"""Pixels of RGB images as a plain Pillow processor makes them, without what it checks anew in every call (slow twin: the processor).

Rescaling and normalising make of each of 256 levels of a channel one number, so the processor's own two steps are asked once, for all
levels, and looked up ever after. What resizes and crops stays the processor's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from teacher_cache.errors import SkipSample

STEPS = (
    "preprocess",
    "_preprocess",
    "_preprocess_image_like_inputs",
    "_prepare_image_like_inputs",
    "process_image",
    "resize",
    "center_crop",
    "rescale",
    "normalize",
)
"""Methods that a processor must have left as its base class wrote them."""
LEVELS = 256
EDGES = ("shortest_edge", "longest_edge")
"""Entries of a processor's ``size``. With both, they bound the number of pixels (Qwen-VL)."""


def check_resized(processor: Any, images: Sequence[PIL.Image.Image], most: int) -> None:
    """SkipSample where an image at the processor's shortest edge would have more than ``most`` pixels (CLIP crops only behind that).

    1 × 20,000 pixels become 336 × 6,720,000 on their way to 336 × 336: a machine without that memory ends every row's work.
    """
    size = getattr(processor, "size", None) or {}
    edges = [size.get(name) if isinstance(size, Mapping) else getattr(size, name, None) for name in EDGES]
    if not getattr(processor, "do_resize", False) or not edges[0] or edges[1]:
        return
    for image in images:
        pixels = edges[0] ** 2 * max(image.size) // min(image.size)
        if pixels > most:
            width, height = image.size
            raise SkipSample(
                "image_too_large",
                f"{width} × {height} pixels at the processor's shortest edge of {edges[0]} are {pixels:,}, the limit is {most:,}",
            )


class PlainPixels:
    """``pixel_values`` of a processor for which ``is_plain`` holds; its settings are those at construction."""

    def __init__(self, processor: Any):
        self.processor = processor
        ramp = np.arange(LEVELS, dtype=np.uint8).reshape(1, 16, 16).repeat(3, axis=0)
        levels = processor.rescale(ramp, processor.rescale_factor) if processor.do_rescale else ramp
        if processor.do_normalize:
            levels = processor.normalize(levels, processor.image_mean, processor.image_std)
        self._levels = np.ascontiguousarray(levels.reshape(3, LEVELS))
        self._kept_sizes: dict[tuple[int, ...], bool] = {}

    def __call__(self, images: Sequence[PIL.Image.Image]) -> dict[str, torch.Tensor]:
        """``{"pixel_values": [images, 3, height, width]}``; ValueError where images end in different sizes, as the processor says."""
        return {"pixel_values": torch.from_numpy(np.stack([self._one(image) for image in images]))}

    def _one(self, image: PIL.Image.Image) -> np.ndarray:
        pixels = np.moveaxis(np.array(image), -1, 0)
        if self.processor.do_resize and not self._kept_sizes.get(pixels.shape, False):
            before = pixels.shape
            pixels = self.processor.resize(image=pixels, size=self.processor.size, resample=self.processor.resample)
            self._kept_sizes[before] = pixels.shape == before  # resizing to the same size changes nothing
        size = self.processor.crop_size
        if self.processor.do_center_crop and pixels.shape[1:] != (size.height, size.width):
            pixels = self.processor.center_crop(pixels, size)
        made = np.empty(pixels.shape, dtype=self._levels.dtype)
        for channel, levels in enumerate(self._levels):
            np.take(levels, pixels[channel], out=made[channel], mode="clip")
        return made


def is_plain(processor: Any) -> bool:
    """Whether an image processor is transformers' Pillow backend with other settings, not other steps."""
    try:
        from transformers.image_processing_backends import PilBackend
    except ImportError:
        return False
    same = all(getattr(type(processor), step, None) is getattr(PilBackend, step) for step in STEPS)
    return same and isinstance(processor, PilBackend) and not getattr(processor, "do_pad", False)
