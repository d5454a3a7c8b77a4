"""tokenpacker against loops over tokens and heads, and the layers that it chooses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from student_train.compressors import CompressorSpec, Site
from student_train.compressors.tokenpacker import default_layers, settle
from teacher_cache.errors import CompatibilityError


@pytest.mark.parametrize("tokens", [9, 4])
def test_each_query_reads_its_own_region(
    make_compressor: Callable[..., Any], assert_same: Callable[..., None], attend: Callable[..., Any], tokens: int
) -> None:
    made = make_compressor("tokenpacker", tokens)
    side, rows = 6, int(math.sqrt(tokens))
    s, one = side // rows, made.module
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter)

    def reference(features: torch.Tensor) -> torch.Tensor:
        last = features[..., -8:].unflatten(1, (side, side))
        # Bilinear at the centre of each window: the mean of the two by two middle patches, or the middle one of three.
        middle = range((s - 1) // 2, s // 2 + 1)
        tokens_out = []
        for top in range(rows):
            for left in range(rows):
                picked = [last[:, top * s + y, left * s + x] for y in middle for x in middle]
                query = one.query_norm(one.query(sum(picked) / len(picked)))
                region = [features[:, (top * s + y) * side + left * s + x] for y in range(s) for x in range(s)]
                keys = torch.stack([one.key_norm(one.key(patch)) for patch in region], 1)
                values = torch.stack([one.value_norm(one.value(patch)) for patch in region], 1)
                read = attend(one.attention, query[:, None], keys, values)[:, 0]
                tokens_out.append(one.linear_2(torch.nn.functional.gelu(one.linear_1(read))))
        return torch.stack(tokens_out, 1)

    assert_same(made, reference)


@pytest.mark.parametrize(
    "depth, layers, chosen",
    [
        (24, (-2,), (12, 16, 22, 23)),  # CLIP-L as the paper has it
        (27, (-1,), (14, 19, 26, 27)),
        (3, (-1,), (2, 3)),
        (1, (-1,), (1,)),
        (24, (8, 16, 23), (8, 16, 23)),
    ],
)
def test_layers_scale_with_the_tower(depth: int, layers: tuple[int, ...], chosen: tuple[int, ...]) -> None:
    assert default_layers(Site(6, 8, 8, layers, depth)) == chosen


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(CompatibilityError, match="no layer 9: choose vision_feature_layers from -4 to 3"):
        settle(CompressorSpec("tokenpacker", layers=(1, 9)), Site(6, 8, 8, (-1,), 3))
    assert settle(CompressorSpec("tokenpacker", layers=(1, -1)), Site(6, 8, 8, (-1,), 3)).layers == (1, -1)
