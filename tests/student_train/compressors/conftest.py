"""Features of a small tower, a stock projector, and compressors in float64 on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from student_train.compressors import CompressorSpec, Site, compressor_module
from tests.close import assert_all_close, assert_close

SITE = Site(side=6, vision_width=8, text_width=10, layers=(-1,), depth=3)


def stock_projector(width: int = SITE.vision_width) -> Any:
    """What ``LlavaMultiModalProjector`` is, in float64."""
    projector = nn.Module()
    projector.linear_1, projector.act = nn.Linear(width, SITE.text_width), nn.GELU()
    projector.linear_2 = nn.Linear(SITE.text_width, SITE.text_width)
    return projector.double()


def attend(attention: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Cross-attention in plain sums, ``[N, Q, D]``: head by head, softmax(q·k / √d) · v, then the output map."""
    q, k, v = attention.query(queries), attention.key(keys), attention.value(values)
    width = q.shape[-1] // attention.heads
    heads = []
    for head in range(attention.heads):
        part = slice(head * width, (head + 1) * width)
        scores = torch.einsum("nqd,nkd->nqk", q[..., part], k[..., part]) / math.sqrt(width)
        heads.append(torch.einsum("nqk,nkd->nqd", scores.softmax(-1), v[..., part]))
    return attention.out(torch.cat(heads, -1))


@pytest.fixture(name="attend")
def attend_fixture() -> Callable[..., torch.Tensor]:
    return attend


@pytest.fixture
def make_compressor() -> Callable[..., Any]:
    """``make_compressor(name, vision_tokens=None, **spec)`` → namespace of module, spec, site, projector, features ``[2, 36, …]``."""

    def make(name: str, vision_tokens: int | None = None, **given: Any) -> Any:
        torch.manual_seed(3)
        module = compressor_module(name)
        projector = stock_projector()
        spec = module.settle(CompressorSpec(name, vision_tokens, **given), SITE)
        built = module.build(spec, SITE, projector).double()
        width = SITE.vision_width * max(1, len(spec.layers))
        features = torch.randn(2, SITE.side**2, width, dtype=torch.float64, requires_grad=True)
        return SimpleNamespace(module=built, spec=spec, site=SITE, projector=projector, features=features)

    return make


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """``assert_same(made, reference)``: values and gradients (features, every parameter) of the module and of ``reference(features)``."""

    def check(made: Any, reference: Callable[[torch.Tensor], torch.Tensor]) -> None:
        inputs = [made.features, *made.module.parameters()]
        fast, slow = made.module(made.features), reference(made.features)
        assert_close(fast, slow, 1e-12)
        weights = torch.randn(fast.shape, dtype=fast.dtype)
        ours, theirs = (torch.autograd.grad((one * weights).sum(), inputs) for one in (fast, slow))
        # A key's bias moves no softmax: its gradient is what rounding leaves of all others.
        assert_all_close(ours, theirs, 1e-12)

    return check
