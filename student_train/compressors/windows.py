"""What compressors share that turn every s×s window of patches into one token."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from student_train.compressors import CompressorSpec, Site
from teacher_cache.errors import CompatibilityError


def possible_counts(side: int) -> list[int]:
    """Vision tokens that whole windows give, most first; the patches themselves are no compression."""
    return [(side // window) ** 2 for window in range(2, side + 1) if side % window == 0]


def settle_windows(spec: CompressorSpec, site: Site) -> CompressorSpec:
    """The count filled in; CompatibilityError where the grid does not fall into that many square windows.

    Windows that overlap (27×27 → 12×12, as adaptive pooling would make them) read some patches twice: refused.
    """
    counts = possible_counts(site.side)
    asked = spec.vision_tokens
    if asked is None:
        asked = site.side**2 // 4 if site.side % 2 == 0 else counts[0]
    if asked not in counts:
        raise CompatibilityError(
            f"compressor {spec.name}: {asked} vision tokens cannot be made of a {site.side}×{site.side} grid by whole "
            f"square windows: choose --vision-tokens from {', '.join(map(str, counts))}"
        )
    return replace(spec, vision_tokens=asked)


def square_grid(spec: CompressorSpec) -> tuple[int, int]:
    """(rows, columns) of a settled spec."""
    rows = math.isqrt(spec.count)
    return rows, rows


def split_windows(features: torch.Tensor, side: int, window: int) -> torch.Tensor:
    """``[N, side², D]`` → ``[N, (side/window)², window², D]``: the patches of each window in reading order, windows too."""
    count, width = side // window, features.shape[-1]
    tiled = features.reshape(-1, count, window, count, window, width).transpose(2, 3)
    return tiled.reshape(-1, count * count, window * window, width)
