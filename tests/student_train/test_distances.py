"""The fast Manhattan distances against all differences at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.losses import distances
from student_train.losses.distances import manhattan
from tests.student_train import plain_losses as plain


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 7), st.integers(0, 7), st.integers(1, 40), st.integers(0, 1000))
def test_any_shape(left: int, right: int, width: int, seed: int) -> None:
    a, b = rows(left, width, seed), rows(right, width, seed + 1)
    torch.testing.assert_close(manhattan(a, b), plain.manhattan(a, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("buffer", [1, 30, 1 << 20])
@pytest.mark.parametrize("columns", [1, 7, 2048])
def test_any_blocks(monkeypatch: pytest.MonkeyPatch, buffer: int, columns: int) -> None:
    monkeypatch.setattr(distances, "BUFFER", buffer)
    monkeypatch.setattr(distances, "COLUMNS", columns)
    a, b = rows(9, 61, 0), rows(5, 61, 1)
    torch.testing.assert_close(manhattan(a, b), plain.manhattan(a, b), rtol=1e-6, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 80), st.floats(0, 6), st.integers(0, 1000))
def test_columns_in_which_the_sides_lie_apart(left: int, spread: float, seed: int) -> None:
    """Some columns above, some below, some equal in all rows, some mixed; as logits of two models are."""
    offset = spread * rows(1, 300, seed + 2)
    a, b = rows(left, 300, seed) + offset, rows(5, 300, seed + 1)
    a[:, :20] = b[:, :20] = 1.5
    a[:, 20:40] = b[0, 20:40]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "PAIRS", 1)
        torch.testing.assert_close(manhattan(a, b), plain.manhattan(a, b), rtol=1e-6, atol=1e-4)


def test_columns_far_from_zero_cancel_nothing() -> None:
    """Logits of one column lie close together wherever the column lies: it is centred before its maxima are summed."""
    offset = 1e3 * rows(1, 500, 2)
    a, b = rows(6, 500, 0) + offset, rows(4, 500, 1) + offset
    torch.testing.assert_close(manhattan(a, b), plain.manhattan(a, b), rtol=1e-6, atol=0)


def test_equal_rows_are_at_no_distance() -> None:
    a = rows(4, 3000, 0)
    distance = manhattan(a, a.clone())
    assert (distance >= 0).all() and distance.diag().max() < 1e-2 < 1e3 < distance[0, 1]


def test_a_wide_vocabulary_keeps_its_digits() -> None:
    """Sums of 2e5 over 150k columns: the float64 running sum leaves the rounding of single differences."""
    a, b = rows(3, 150_000, 0), rows(3, 150_000, 1)
    torch.testing.assert_close(manhattan(a, b), plain.manhattan(a, b), rtol=1e-6, atol=0)


def test_sides_of_two_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "PAIRS", 1)
    a, b = rows(20, 50, 0).double() + 3, rows(4, 50, 1)
    torch.testing.assert_close(manhattan(a, b), torch.cdist(a, b.double(), p=1.0), rtol=1e-6, atol=1e-6)


def test_values_without_meaning_stay_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = rows(3, 20, 0), rows(2, 20, 1)
    a[1, 3] = torch.nan
    assert not torch.isfinite(manhattan(a, b)[1]).any()
    monkeypatch.setattr(distances, "PAIRS", 1)
    assert not torch.isfinite(manhattan(a + 9, b)[1]).any()  # all other columns lie apart
