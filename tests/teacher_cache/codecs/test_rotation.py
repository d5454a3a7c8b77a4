"""The map before rounding: orthogonal at every width, the same everywhere, and what it does to dimensions that tower over all others."""

from __future__ import annotations

import math

import pytest
import torch

from teacher_cache.codecs import container, rotation, row_codec
from teacher_cache.codecs.rotation import rotate, rotate_back
from teacher_cache.errors import KdcliError

WIDTHS = (1, 2, 3, 7, 48, 64, 67, 192, 576, 896)
"""Odd ones, a prime, powers of two, and widths of language models."""

SIGNS = "++-+-++-++-+-+--"


def states(rows: int, width: int = 192, outliers: int = 5, factor: float = 36.0) -> torch.Tensor:
    """Rows with a common mean, a few dimensions of which are 10 to ``factor`` times the median, as in real models."""
    draw = torch.Generator().manual_seed(rows)
    scale = torch.ones(width)
    scale[torch.randperm(width, generator=draw)[:outliers]] = torch.linspace(10, factor, outliers)
    mean = torch.randn(width, generator=torch.Generator().manual_seed(1))
    return (torch.randn(rows, width, generator=draw) + mean) * scale


@pytest.mark.parametrize("width", WIDTHS)
def test_lengths_and_angles_stay_and_the_way_back_is_exact(width: int) -> None:
    square = rotate(torch.eye(width)).double()
    torch.testing.assert_close(square @ square.T, torch.eye(width).double(), rtol=0, atol=1e-6)
    rows = states(5, width, min(2, width))
    size = float(rows.abs().max())
    assert (rotate_back(rotate(rows)) - rows).abs().max() < 3e-6 * size
    torch.testing.assert_close(rotate(rows).norm(dim=1), rows.norm(dim=1), rtol=1e-5, atol=0)


def test_the_map_is_written_down() -> None:
    """In float64 from its definition, signs as literals: what is stored today is read by any machine."""
    signs, cosine, left, right = rotation._maps(48, torch.device("cpu"))
    assert "".join("-" if one < 0 else "+" for one in signs[:16]) == SIGNS
    assert left.shape == (4, 4) and right.shape == (4, 4) and cosine.shape == (3, 3)
    expected = [
        [math.cos(math.pi * (j + 0.5) * k / 3) * math.sqrt((1 if k == 0 else 2) / 3) for j in range(3)]
        for k in range(3)
    ]
    torch.testing.assert_close(cosine, torch.tensor(expected), rtol=1e-6, atol=1e-7)
    hadamard = torch.tensor([[(-1.0) ** (i & j).bit_count() / 4 for j in range(16)] for i in range(16)])
    assert torch.equal(torch.kron(left, right), hadamard)
    rows = states(3, 48)
    whole = torch.kron(torch.tensor(expected).double(), hadamard.double())
    torch.testing.assert_close(rotate(rows).double(), (rows * signs).double() @ whole.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("codec", "rows", "gain"), [("int8", 3, 10.0), ("int8", 40, 15.0), ("int4", 3, 1.5), ("int4", 40, 6.0)]
)
def test_outlying_dimensions_no_longer_drown_the_others(codec: str, rows: int, gain: float) -> None:
    """Divergence of softmax(W·h) through a head that reads every dimension alike, against version 1 at (nearly) the same bytes."""
    hidden = states(rows)
    scale = hidden.abs().median(dim=0).values
    head = torch.randn(300, 192, generator=torch.Generator().manual_seed(2)) / scale / 7
    truth = torch.log_softmax(hidden @ head.T, dim=1)
    found = []
    for version in (1, 2):
        one = row_codec(codec, version)
        record = container.unpack(container.pack(one.encode(hidden)))
        read = torch.log_softmax(one.decode(record) @ head.T, dim=1)
        found.append(float((truth.exp() * (truth - read)).sum(dim=1).mean()))
    assert found[1] * gain < found[0]


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_mean_is_one_row_more_where_rows_are_many(codec: str) -> None:
    one = row_codec(codec)
    for rows in (1, 15, 16, 17, 100):
        stored = one.encode(states(rows))
        assert len(stored["rows"]) == rows + (rows >= 16)
        assert one.decode(stored).shape == (rows, 192)
    apart = [row_codec(codec).decode(row_codec(codec).encode(part)) for part in states(64).split(8)]
    errors = [
        float((read - states(64)).square().mean()) for read in (one.decode(one.encode(states(64))), torch.cat(apart))
    ]
    assert errors[0] < 0.8 * errors[1]


def test_rows_that_are_no_numbers_are_never_stored() -> None:
    for bad in (torch.nan, torch.inf):
        rows = states(20)
        rows[3, 4] = bad
        with pytest.raises(KdcliError, match="NaN"):
            row_codec("int8").encode(rows)


def test_a_width_that_no_model_has_asks_for_no_memory() -> None:
    with pytest.raises(KdcliError, match="width 800012 cannot be rotated: 200003 is its largest odd factor"):
        row_codec("int8").decode({"rows": torch.zeros(1, 800_012, dtype=torch.int8), "scale": torch.ones(1)})


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_shapes_alone_are_enough_for_a_plan(codec: str) -> None:
    for rows in (0, 3, 30):
        real, shape = (row_codec(codec).encode(torch.zeros(rows, 67, device=where)) for where in ("cpu", "meta"))
        assert {n: (t.shape, t.dtype) for n, t in real.items()} == {n: (t.shape, t.dtype) for n, t in shape.items()}
