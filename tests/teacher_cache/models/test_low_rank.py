"""The low-rank head: three ways to the same logits."""

from __future__ import annotations

import pytest
import torch

from teacher_cache.models.low_rank import LowRankHead
from teacher_cache.signal_records import Sketch

V, RANK = 900, 20


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head(offset: float = 0.0) -> LowRankHead:
    """Columns centred before they are rounded, as calibration leaves them."""
    weight = random(V, RANK, seed=1) * torch.logspace(0, -1, RANK)
    bias = random(V, seed=2) * 2
    return LowRankHead((weight - weight.mean(dim=0) + offset).to(torch.bfloat16), bias - bias.mean())


def sketch(rows: int, seed: int = 3, mean: float = -40.0) -> Sketch:
    return Sketch(random(rows, RANK, seed=seed) * 4, random(rows, seed=seed + 1) * 5 + mean)


def dense(given: LowRankHead, of: Sketch) -> torch.Tensor:
    return of.coefficients.double() @ given.weight.double().T + given.bias.double() + of.mean_logit.double()[:, None]


def test_logits_are_the_formula() -> None:
    given, of = head(), sketch(9)
    on_cpu = given.to(torch.device("cpu"))
    assert on_cpu.weight.dtype == torch.float32
    torch.testing.assert_close(on_cpu.logits(of).double(), dense(given, of), atol=1e-4, rtol=1e-6)


def test_logits_of_some_tokens_are_those_of_all() -> None:
    given, of = head(), sketch(9)
    ids = torch.randint(0, V, (9, 7), generator=torch.Generator().manual_seed(5))
    for one in (given, given.to(torch.device("cpu"))):
        torch.testing.assert_close(
            one.logits_at(of, ids).double(), dense(given, of).gather(1, ids), atol=1e-4, rtol=1e-6
        )


@pytest.mark.parametrize("mean", [0.0, -40.0])
def test_gram_without_the_vocabulary_is_that_of_the_logits(mean: float) -> None:
    """Off by what bfloat16 left of the columns' means, m·Σ(W′y + b), which is far below what a relation loss can see."""
    given, of = head().to(torch.device("cpu")), sketch(12, mean=mean)
    logits = dense(given, of)
    exact = logits @ logits.T
    left = torch.outer(of.mean_logit.double(), (logits - of.mean_logit.double()[:, None]).sum(dim=1))
    torch.testing.assert_close(given.gram(of).double(), exact - left - left.T, atol=1e-5 * float(exact.max()), rtol=0)
    assert float((left + left.T).abs().max()) < 2e-4 * float(exact.diagonal().mean())


def test_one_row_and_none() -> None:
    given = head()
    assert given.gram(sketch(0)).shape == (0, 0)
    assert given.logits(sketch(0)).shape == (0, V)
    assert given.logits_at(sketch(1), torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3)


def test_half_precision_coefficients_cost_what_their_rounding_is() -> None:
    """On a GPU the product runs in the head's bfloat16: each coefficient is off by 2⁻⁹ of itself at most."""
    given, of = head(), sketch(9)
    allowed = 2.0**-8.9 * of.coefficients.abs() @ given.weight.float().abs().T
    assert ((given.logits(of).double() - dense(given, of)).abs() <= allowed + 1e-4).all()
