"""Sketches: how far logits through the low-rank head are from W·h, in the terms of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from teacher_cache.codecs import container, transform
from teacher_cache.errors import KdcliError
from teacher_cache.fields import create_field
from teacher_cache.fields.hidden import mean_probs
from teacher_cache.models.low_rank import LowRankHead
from teacher_cache.records import ImageLayout, TeacherOutput, View
from teacher_cache.signal_records import Sketch

V, D = 700, 32
GRID = (6, 6)
LAYOUT = (ImageLayout((96, 96), (View((0, 0, 96, 96), GRID),)),)


def head_of(seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    """W: near-collinear directions, and a mean that all logits share (not centred: mean logits far from 0)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V, D, generator=generator) * torch.logspace(0, -1.5, D) + offset


def states(seed: int, pictures: int) -> list[torch.Tensor]:
    """Smooth over the grid, as vision tokens are, around a mean."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1))).Q
    coarse = torch.randn(pictures, D, 3, 3, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=GRID, mode="bilinear", align_corners=True)
    rows = smooth.flatten(2).transpose(1, 2) + 0.2 * torch.randn(pictures, 36, D, generator=generator)
    return list((rows * torch.logspace(0.7, -1.5, D)) @ axes + 0.5)


@dataclass(frozen=True)
class Sketched:
    field: Any
    coder: transform.Transform
    head: LowRankHead
    weights: torch.Tensor
    """w of the metric, float64 ``[V]``."""

    def read(self, rows: torch.Tensor, layout: Sequence[ImageLayout] = LAYOUT) -> Sketch:
        said = TeacherOutput({"vision": rows}, layout=tuple(layout))
        return self.field.decode(container.unpack(container.pack(self.field.encode(None, said))))


@cache
def sketched(step: float, offset: float = 0.0, layout: bool = True) -> Sketched:
    head = head_of(offset=offset)
    field = create_field("vision_hidden", {"codec": "sketch", "step": step})
    rows = states(2, 40)
    given = LAYOUT if layout else ()
    fitted = field.fit([TeacherOutput({"vision": one}, layout=given) for one in rows], head)
    weights = 0.5 * mean_probs(torch.cat(rows), head).double() + 0.5 / V
    low_rank = LowRankHead(fitted.low_rank_head["weight"], fitted.low_rank_head["bias"]).to(torch.device("cpu"))
    return Sketched(field.with_calibration(fitted.tensors), transform.Transform.of(fitted.tensors), low_rank, weights)


def logits_of(rows: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    return rows.double() @ head_of(offset=offset).double().T


def weighted_variance(errors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    mean = errors @ weights
    return (errors - mean[:, None]).square() @ weights


@pytest.mark.parametrize("layout", [True, False], ids=["grid", "no grid"])
@pytest.mark.parametrize("step", [0.02, 0.1, 0.5])
def test_the_weighted_error_of_logits_is_that_of_the_quantiser(step: float, layout: bool) -> None:
    """‖S·δh‖² = Σ (y − ŷ)²: at most Δ²/4 a dimension, about Δ²/12; dimensions that are left out count with what they held.

    Over a grid the sum of squares is the same before and after the cosine transform.
    """
    whole = sketched(step, layout=layout)
    errors = []
    for rows in states(3, 10):
        sketch = whole.read(rows, LAYOUT if layout else ())
        errors.append(weighted_variance(whole.head.logits(sketch).double() - logits_of(rows), whole.weights))
    rmse = float(torch.cat(errors).mean().sqrt())
    rounding = 2.0**-8 * 3  # of W′ to bfloat16, for coefficients of a few units
    assert rmse <= step * (D / 4) ** 0.5
    assert rmse <= 1.05 * step * (D / 12) ** 0.5 + rounding
    if step == 0.5:
        assert rmse < 0.9 * step * (D / 12) ** 0.5, "dimensions below the step cost less than its square / 12"


def test_a_small_step_leaves_the_rounding_of_the_head_alone() -> None:
    """Every logit within Σ|W′|(2⁻⁹|y| + Δ): bfloat16, and half a step with its shift; 1/256 is the mean logit's."""
    whole = sketched(1e-3, layout=False)
    assert whole.coder.rank == D
    for rows in states(4, 3):
        sketch = whole.read(rows, ())
        size = whole.head.weight.abs().T
        error = (whole.head.logits(sketch).double() - logits_of(rows)).abs()
        rounding = 2.0**-9 * sketch.coefficients.abs() @ size
        assert (error <= rounding + 1e-3 * size.sum(dim=0) + 1 / 256).all()
        assert float(error.mean()) < 0.5 * float(rounding.mean())


@pytest.mark.parametrize("offset", [0.0, 3.0, -20.0])
def test_the_mean_logit_is_exact_to_a_256th(offset: float) -> None:
    """Also where the logits of every row lie far from 0, each row's elsewhere: two bytes a row more at most, or escapes."""
    whole = sketched(0.1, offset)
    rows = torch.cat(states(5, 1))
    sketch = whole.read(rows)
    exact = logits_of(rows, offset).mean(dim=1)
    assert float(exact.abs().max()) > 10 * abs(offset)
    assert ((sketch.mean_logit.double() - exact).abs() <= 1 / 256 + 1e-6 * exact.abs()).all()
    own = whole.head.logits(sketch).double().mean(dim=1)
    torch.testing.assert_close(own, sketch.mean_logit.double(), atol=2e-3, rtol=0)
    plain = sketched(0.1).field.encode(None, TeacherOutput({"vision": rows}, layout=LAYOUT))
    given = whole.field.encode(None, TeacherOutput({"vision": rows}, layout=LAYOUT))
    assert given["coded"].numel() <= plain["coded"].numel() + (2 if offset > -20 else 5) * len(rows)


def test_a_grid_costs_fewer_bytes_at_the_same_error() -> None:
    on, off = sketched(0.1), sketched(0.1, layout=False)
    rows = states(6, 10)
    sizes = [
        sum(one.field.encode(None, TeacherOutput({"vision": r}, layout=lay))["coded"].numel() for r in rows)
        for one, lay in ((on, LAYOUT), (off, ()))
    ]
    assert sizes[0] < 0.85 * sizes[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_teachers_of_any_dtype(dtype: torch.dtype) -> None:
    field = create_field("vision_hidden", {"codec": "sketch", "step": 0.1})
    said = [TeacherOutput({"vision": one.to(dtype)}, layout=LAYOUT) for one in states(2, 10)]
    fitted = field.fit(said, head_of().to(dtype))
    head = LowRankHead(fitted.low_rank_head["weight"], fitted.low_rank_head["bias"]).to(torch.device("cpu"))
    ready = field.with_calibration(fitted.tensors)
    sketch = ready.decode(ready.encode(None, said[0]))
    exact = said[0].hidden["vision"].double() @ head_of().to(dtype).double().T
    assert float((head.logits(sketch) - exact).square().mean().sqrt()) < 0.5


def test_rows_that_are_no_numbers_are_never_stored() -> None:
    for bad in (torch.nan, torch.inf):
        rows = states(7, 1)[0].clone()
        rows[3, 4] = bad
        with pytest.raises(KdcliError, match="NaN"):
            sketched(0.1).field.encode(None, TeacherOutput({"vision": rows}, layout=LAYOUT))


def test_too_few_rows_name_the_flag() -> None:
    field = create_field("vision_hidden", {"codec": "sketch"})
    with pytest.raises(
        KdcliError, match=r"field vision_hidden: .*36 rows of width 32: at least 64.*--calibration-rows"
    ):
        field.fit([TeacherOutput({"vision": states(1, 1)[0]}, layout=LAYOUT)], head_of())
    with pytest.raises(KdcliError, match="needs its calibration"):
        field.encode(None, TeacherOutput({"vision": states(1, 1)[0]}))


def test_only_the_mean_weight_and_the_coder_are_kept_for_encoding() -> None:
    """The low-rank head is for training alone: a worker that encodes never loads it."""
    tensors = sketched(0.1).field._calibration
    assert not any(one.shape[:1] == (V,) and one.ndim == 2 for one in tensors.values())
