"""adaptive_pool and pixel_shuffle against plain loops, and the counts that whole windows give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from student_train.compressors import CompressorSpec, Site
from student_train.compressors.windows import possible_counts, settle_windows, split_windows
from teacher_cache.errors import CompatibilityError
from tests.close import assert_close


def windows_of(features: torch.Tensor, side: int, rows: int) -> list[list[torch.Tensor]]:
    """Patches ``[N, D]`` of every window, one by one."""
    s = side // rows
    return [
        [features[:, (top * s + y) * side + left * s + x] for y in range(s) for x in range(s)]
        for top in range(rows)
        for left in range(rows)
    ]


def mlp(one: Any, x: torch.Tensor) -> torch.Tensor:
    return one.linear_2(torch.nn.functional.gelu(one.linear_1(x)))


@pytest.mark.parametrize("tokens", [9, 4, 1])
def test_adaptive_pool(make_compressor: Callable[..., Any], assert_same: Callable[..., None], tokens: int) -> None:
    made = make_compressor("adaptive_pool", tokens)

    def reference(features: torch.Tensor) -> torch.Tensor:
        windows = windows_of(features, made.site.side, int(tokens**0.5))
        return torch.stack([mlp(made.module, sum(patches) / len(patches)) for patches in windows], 1)

    assert_same(made, reference)
    image = made.features.transpose(1, 2).unflatten(2, (6, 6))
    pooled = torch.nn.functional.adaptive_avg_pool2d(image, int(tokens**0.5)).flatten(2).transpose(1, 2)
    assert_close(made.module(made.features), mlp(made.projector, pooled), 1e-12)


@pytest.mark.parametrize("tokens", [9, 4])
def test_pixel_shuffle(make_compressor: Callable[..., Any], assert_same: Callable[..., None], tokens: int) -> None:
    made = make_compressor("pixel_shuffle", tokens)
    torch.nn.init.normal_(made.module.linear_1.weight)

    def reference(features: torch.Tensor) -> torch.Tensor:
        windows = windows_of(features, made.site.side, int(tokens**0.5))
        return torch.stack([mlp(made.module, torch.cat(patches, -1)) for patches in windows], 1)

    assert_same(made, reference)


def test_pixel_shuffle_starts_as_adaptive_pool(make_compressor: Callable[..., Any]) -> None:
    pool, shuffle = make_compressor("adaptive_pool"), make_compressor("pixel_shuffle")
    assert pool.module.linear_1 is pool.projector.linear_1, "the trained weights, not a copy"
    assert_close(shuffle.module(pool.features), pool.module(pool.features), 1e-12)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3))
def test_windows_hold_every_patch_once(count: int, window: int, width: int) -> None:
    side = count * window
    features = torch.arange(2 * side * side * width).reshape(2, side * side, width)
    tiled = split_windows(features, side, window)
    assert tiled.shape == (2, count**2, window**2, width)
    assert torch.equal(tiled.flatten().sort().values, features.flatten())
    expected = torch.stack([torch.stack(patches, 1) for patches in windows_of(features, side, count)], 1)
    assert torch.equal(tiled, expected)


@pytest.mark.parametrize("side, counts", [(24, [144, 64, 36, 16, 9, 4, 1]), (27, [81, 9, 1]), (6, [9, 4, 1]), (7, [1])])
def test_possible_counts(side: int, counts: list[int]) -> None:
    assert possible_counts(side) == counts
    site = Site(side, 8, 8, (-1,), 3)
    settled = settle_windows(CompressorSpec("adaptive_pool"), site)
    assert settled.vision_tokens == counts[0], "a quarter, or the most that there is"
    for tokens in (0, -4, 144 if side == 27 else 12, side * side, side * side + 1):
        with pytest.raises(
            CompatibilityError, match=rf"{tokens} vision tokens.*{side}×{side}.*choose.*{counts[-1]}"
        ) as caught:
            settle_windows(CompressorSpec("adaptive_pool", tokens), site)
        assert "\n" not in str(caught.value)
