"""Drawn columns: how many, how often, and what their weighted sum estimates."""

from __future__ import annotations

import pytest
import torch

from student_train.losses.column_sampling import ColumnSampler, column_spread, inclusion, sampler_of_head

IMPORTANCE = torch.tensor([5.0, 1.0, 1.0, 0.0, 2.0, 1.0, 3.0, 1.0])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("count", range(1, 12))
def test_so_many_columns_each_once(count: int) -> None:
    columns, weights = ColumnSampler.of(IMPORTANCE, count).draw(generator(count))
    assert len(columns) == len(weights) == min(count, 8) == len(set(columns.tolist()))
    assert (weights >= 1).all()


@pytest.mark.parametrize("importance", [IMPORTANCE, torch.ones(8)], ids=["by importance", "uniform"])
def test_a_weighted_sum_is_unbiased(importance: torch.Tensor) -> None:
    values, count, draws = torch.arange(8.0) ** 2, 3, 4000
    source, sampler = generator(0), ColumnSampler.of(importance, count)
    sums, seen = torch.zeros(draws), torch.zeros(8)
    for i in range(draws):
        columns, weights = sampler.draw(source)
        sums[i] = (weights * values[columns]).sum()
        seen[columns] += 1
    assert abs(sums.mean() - values.sum()) < 4 * sums.std() / draws**0.5
    chances = inclusion(importance.double(), count)
    torch.testing.assert_close(seen.double() / draws, chances, atol=0.035, rtol=0)


def test_what_matters_most_is_always_there() -> None:
    importance = torch.tensor([100.0, *[1.0] * 30])
    assert inclusion(importance.double(), 4).sum() == pytest.approx(4) and inclusion(importance.double(), 4)[0] == 1
    for seed in range(20):
        columns, weights = ColumnSampler.of(importance, 4).draw(generator(seed))
        assert columns[0] == 0 and weights[0] == 1


def test_the_draw_is_a_function_of_the_generator() -> None:
    first, again, other = (ColumnSampler.of(torch.ones(500), 20).draw(generator(seed))[0] for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


def test_nothing_is_important() -> None:
    columns, weights = ColumnSampler.of(torch.zeros(10), 4).draw(generator(0))
    assert len(columns) == 4 and torch.allclose(weights, torch.full((4,), 2.5))


def test_the_spread_of_columns() -> None:
    """A part that all rows of the head share counts for nothing; half precision and many rows change little."""
    head = torch.randn(9000, 6, generator=generator(0))
    expected = (head.double() - head.double().mean(dim=0)).norm(dim=1)
    torch.testing.assert_close(column_spread(head), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(column_spread(head + 3.0), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(column_spread(head.bfloat16()), expected, rtol=0.02, atol=0.02)
    assert column_spread(head) is column_spread(head)
    assert sampler_of_head(head, 8000, 50) is sampler_of_head(head, 8000, 50)
    assert sampler_of_head(head, 8000, 50).draw(generator(1))[0].max() < 8000
