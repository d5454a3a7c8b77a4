"""Where vision tokens come from: views, crop boxes and token grids of an image, as its family cuts it (``families/``).

The caller holds the sum of tokens against the row's, so that a family that does otherwise is refused and never read wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from teacher_cache.families import family_of, layout_family
from teacher_cache.records import ImageLayout

COMPRESSED = "kdcli_compressor"
"""Entry in the configuration of a student whose projector leaves fewer vision tokens than patches (student_train/compression.py)."""


def image_layout(
    config: Any, processor: Any, sizes: Sequence[tuple[int, int]], inputs: Mapping[str, Any], tokens: int
) -> tuple[ImageLayout, ...]:
    """Layout of every image of a row; arguments and errors as of ``Family.views``."""
    views = layout_family(config, processor, inputs).views(config, processor, sizes, inputs, tokens)
    return tuple(ImageLayout(size, tuple(of_image)) for size, of_image in zip(sizes, views))


def typical_tokens(config: Any, processor: Any) -> int:
    """Vision tokens of a photograph, for estimates; 0 of a model that reads text alone."""
    return 0 if processor.image_processor is None else family_of(config).typical_tokens(config, processor)
