"""Looked-up pixels are the processor's own, bit by bit; a processor with steps of its own is left to itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil, SiglipImageProcessorPil

from teacher_cache.pixels import PlainPixels, is_plain

SIDE = {"height": 40, "width": 40}
PROCESSORS: dict[str, Any] = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=SIDE),
    "a crop larger than the image": CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=SIDE),
    "siglip": SiglipImageProcessorPil(size=SIDE, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]),
    "not normalised": CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=SIDE, do_normalize=False),
}


def pictures(*sizes: tuple[int, int]) -> list[PIL.Image.Image]:
    draw = np.random.default_rng(0)
    return [PIL.Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_the_processors(name: str) -> None:
    processor = PROCESSORS[name]
    assert is_plain(processor)
    ours = PlainPixels(processor)
    for _ in range(2):  # the second time, sizes are known
        for images in (pictures((40, 40)), pictures((64, 40)), pictures((40, 90), (33, 31), (40, 40))):
            theirs = dict(processor(images, return_tensors="pt"))
            assert set(theirs) == {"pixel_values"}
            made = ours(images)["pixel_values"]
            assert made.dtype == theirs["pixel_values"].dtype and torch.equal(made, theirs["pixel_values"])


def test_a_processor_with_steps_of_its_own_is_not_plain() -> None:
    class Bordered(CLIPImageProcessorPil):
        def resize(self, image: Any, *arguments: Any, **settings: Any) -> Any:
            return super().resize(image, *arguments, **settings)[:, 1:-1]

    assert not is_plain(Bordered(size={"shortest_edge": 40}, crop_size=SIDE))
    assert not is_plain(LlavaNextImageProcessorPil())
