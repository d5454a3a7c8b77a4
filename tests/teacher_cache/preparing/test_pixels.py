"""Looked-up pixels are the processor's own, bit by bit; a processor with steps of its own is left to itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil, SiglipImageProcessorPil

from teacher_cache.preparing.pixels import PlainPixels, is_plain

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


def test_a_sliver_is_skipped_before_the_shortest_edge_makes_it_enormous() -> None:
    """By both kinds of ``size`` that processors have; never where the longest edge, or both edges, bound the pixels."""
    from types import SimpleNamespace

    from transformers import CLIPImageProcessorPil, Idefics3ImageProcessorPil

    from teacher_cache.errors import SkipSample
    from teacher_cache.preparing.pixels import check_resized

    sliver, narrow = PIL.Image.new("RGB", (1, 20_000)), PIL.Image.new("RGB", (2000, 3))
    clip = CLIPImageProcessorPil(size={"shortest_edge": 336})
    for processor in (clip, SimpleNamespace(size={"shortest_edge": 336}, do_resize=True)):
        check_resized(processor, [narrow], 89_478_485)
        with pytest.raises(
            SkipSample, match=r"image_too_large: 1 × 20000 pixels .* 336 are 2,257,920,000, the limit is 89"
        ):
            check_resized(processor, [narrow, sliver], 89_478_485)
    both = SimpleNamespace(size={"shortest_edge": 3136, "longest_edge": 10**6}, do_resize=True)
    for processor in (
        both,
        Idefics3ImageProcessorPil(),
        CLIPImageProcessorPil(size={"height": 9, "width": 9}),
        object(),
    ):
        check_resized(processor, [sliver], 1)
