"""Top-k, tail and log Z against a dense float64 computation of the same logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.models import head
from teacher_cache.models.head import head_logits, topk_rows
from teacher_cache.signal_records import TopK


def dense(logits: torch.Tensor, k: int) -> TopK:
    """The definition, float64, no chunk and no trick: the tail is the log-sum-exp of everything but the k largest."""
    logits = logits.to(torch.float64)
    log_z = logits.logsumexp(dim=1)
    ordered, ids = logits.sort(dim=1, descending=True)
    return TopK(
        ids[:, :k],
        ordered[:, :k] - log_z[:, None],
        ordered[:, k:].logsumexp(dim=1) - log_z,
        log_z,
    )


def from_logits(logits: torch.Tensor, k: int) -> TopK:
    """``topk_rows`` on exactly these logits: an identity head."""
    return topk_rows(logits, torch.eye(logits.shape[1]), k)


def assert_close(got: TopK, want: TopK, absolute: float = 2e-5, relative: float = 3e-6) -> None:
    assert torch.equal(got.ids, want.ids)
    for name in ("log_probs", "log_tail", "log_z"):
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(want, name), atol=absolute, rtol=relative, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 60.0])
@pytest.mark.parametrize("k", [1, 5, 64])
def test_random_rows(scale: float, k: int) -> None:
    logits = torch.randn(9, 1000, generator=torch.Generator().manual_seed(k)) * scale
    assert_close(from_logits(logits, k), dense(logits, k))


@pytest.mark.parametrize("gap", [10.0, 40.0, 80.0, 120.0, 500.0])
def test_the_tail_is_exact_however_peaked(gap: float) -> None:
    """exp of a tail below -104 is 0 in float32; its logarithm must still be right."""
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(4), torch.arange(4)] += gap
    got, want = from_logits(logits, 1), dense(logits, 1)
    assert_close(got, want)
    assert torch.isfinite(got.log_tail).all()


def test_a_small_head_of_a_flat_row_is_exact() -> None:
    """Here the tail is nearly everything: log_tail is tiny and must keep its relative precision, 1 - e^tail is the head's mass."""
    logits = torch.randn(3, 50_000, generator=torch.Generator().manual_seed(1)) * 1e-2
    got = topk_rows(torch.ones(3, 1), logits[:1].T.contiguous(), 2)
    want = dense(logits[:1].expand(3, -1), 2)
    mass = -torch.expm1(got.log_tail.double())
    torch.testing.assert_close(mass, -torch.expm1(want.log_tail), rtol=1e-4, atol=0.0)


def test_all_of_the_vocabulary_leaves_no_tail() -> None:
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    for k in (12, 50):
        got = from_logits(logits, k)
        assert got.ids.shape == (5, 12)
        assert (got.log_tail == -math.inf).all()
        torch.testing.assert_close(got.log_probs.exp().sum(dim=1), torch.ones(5))


def test_no_rows() -> None:
    got = topk_rows(torch.zeros(0, 4), torch.randn(10, 4), 3)
    assert got.ids.shape == got.log_probs.shape == (0, 3)
    assert got.ids.dtype == torch.int64
    assert got.log_tail.shape == got.log_z.shape == (0,)


@pytest.mark.parametrize("rows_a_chunk", [1, 3, 1000])
def test_chunks_have_no_effect(monkeypatch: pytest.MonkeyPatch, rows_a_chunk: int) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(11, 16, generator=generator), torch.randn(500, 16, generator=generator)
    monkeypatch.setattr(head, "CHUNK_BYTES", rows_a_chunk * 4 * 500)
    assert_close(topk_rows(hidden, weight, 7), dense(hidden.double() @ weight.double().T, 7))


def test_half_precision_heads_are_multiplied_in_float32() -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(6, 64, generator=generator).to(torch.bfloat16)
    weight = torch.randn(300, 64, generator=generator).to(torch.bfloat16)
    logits = head_logits(hidden, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), hidden.double() @ weight.double().T, atol=1e-4, rtol=1e-5)


def test_nan_rows_stay_where_they_are() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(5))
    logits[1, 4] = math.nan
    got = from_logits(logits, 4)
    assert torch.isfinite(got.log_z).tolist() == [True, False, True]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.floats(-300, 300, width=32), min_size=6, max_size=6), min_size=1, max_size=4),
    st.integers(1, 5),
)
def test_any_row(rows: list[list[float]], k: int) -> None:
    logits = torch.tensor(rows)
    got, want = from_logits(logits, k), dense(logits, k)
    torch.testing.assert_close(
        logits.gather(1, got.ids), logits.gather(1, want.ids), atol=0, rtol=0
    )  # ties: any of them
    for name in ("log_probs", "log_tail", "log_z"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), atol=1e-4, rtol=1e-5)
    total = got.log_probs.double().exp().sum(dim=1) + got.log_tail.double().exp()
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)
