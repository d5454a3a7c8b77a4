"""Coded top-k: how far its numbers are from the teacher's, on rows of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codecs import container
from teacher_cache.errors import KdcliError
from teacher_cache.fields import create_field
from teacher_cache.records import TeacherOutput
from teacher_cache.signal_records import TopK

V = 300


def truth(seed: int, rows: int, scale: float, k: int, vocabulary: int = V) -> TopK:
    """Heads of random logits: flat at scale 0.01, saturated at 200."""
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale
    return of_logits(logits, k)


def of_logits(logits: torch.Tensor, k: int) -> TopK:
    """In float64, stored as the teacher hands it over."""
    log_p = logits.double().log_softmax(dim=1)
    values, ids = log_p.topk(min(k, logits.shape[1]), dim=1)
    log_tail = log_p.scatter(1, ids, -torch.inf).logsumexp(dim=1)
    return TopK(ids, values.float(), log_tail.float(), logits.double().logsumexp(dim=1).float())


def said(topk: TopK) -> TeacherOutput:
    return TeacherOutput({}, {"vision": topk})


def fitted(k: int = 8, scale: float = 3.0, vocabulary: int = V, samples: int = 30, **params: Any) -> Any:
    field = create_field("vision_topk", {"k": k, **params})
    head = torch.zeros(vocabulary, 1)
    return field.with_calibration(
        field.fit([said(truth(s, 20, scale, k, vocabulary)) for s in range(samples)], head).tensors
    )


def round_trip(field: Any, topk: TopK) -> TopK:
    return field.decode(container.unpack(container.pack(field.encode(None, said(topk)))))


def bound(values: torch.Tensor, step: float) -> torch.Tensor:
    """Of a number x on ``LogScale`` or ``LogOdds``, with the expansion's second order and float32's own rounding."""
    return step / 2 * (1 + values.abs() / 4) * 1.01 + 1e-5 * (1 + values.abs())


def check(field: Any, topk: TopK) -> TopK:
    """Every stated bound, and what must be exact."""
    step = field.params["step"]
    k = min(field.params["k"], topk.ids.shape[1])
    decoded = round_trip(field, topk)
    assert torch.equal(decoded.ids, topk.ids[:, :k]) and decoded.ids.dtype == torch.int64
    head = decoded.log_probs.double().exp().sum(dim=1)
    torch.testing.assert_close(head + decoded.log_tail.double().exp(), torch.ones_like(head), atol=2e-6, rtol=0)
    exact = topk.log_probs[:, :k]
    odds = topk.log_tail - exact.logsumexp(dim=1)
    finite = torch.isfinite(odds)
    own = torch.logit(decoded.log_tail.double().exp())  # the odds again, where they are moderate
    moderate = finite & (odds.abs() < 8)
    assert ((own - odds)[moderate].abs() <= bound(odds, step / 2)[moderate] + 1e-3).all()
    assert torch.equal(torch.isinf(decoded.log_tail), torch.isinf(topk.log_tail))
    # One entry by its own step, all together by renormalising: by the mean of the others' steps, and by that of the odds.
    each = bound(exact, step)
    shares = exact.softmax(dim=1)
    common = (shares * each).sum(dim=1, keepdim=True) + torch.where(finite, bound(odds, step / 2), 0.0)[:, None]
    assert ((decoded.log_probs - exact).abs() <= each + common).all()
    assert ((decoded.log_z - topk.log_z).abs() <= 1 / 64 + 1e-6 * topk.log_z.abs()).all()
    assert (decoded.log_probs.diff(dim=1) <= 0).all(), "by falling log-prob"
    return decoded


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 12),
    st.sampled_from([0.0, 1e-3, 0.3, 3.0, 30.0, 300.0]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1 / 64, 1 / 4]),
)
def test_every_number_is_within_its_bound(seed: int, rows: int, scale: float, k: int, step: float) -> None:
    """Also rows unlike those of the calibration: that costs bytes, never correctness."""
    check(FIELDS[k, step], truth(seed, rows, scale, k))


FIELDS = {(k, step): fitted(k, step=step) for k in (1, 2, 8) for step in (1 / 64, 1 / 4)}


def test_a_flat_row_keeps_its_head() -> None:
    """Eight of 150,000 equal tokens hold 5e-5: a tail rounded to 1 would leave nothing for them."""
    flat = truth(1, 6, 1e-3, 8, 150_000)
    assert float(flat.log_tail.max()) < 0 and float(flat.log_tail.min()) > -1e-4
    decoded = check(fitted(8, 3.0, 150_000, samples=1), flat)
    torch.testing.assert_close(decoded.log_probs, flat.log_probs, atol=0.1, rtol=0)


@pytest.mark.parametrize("gap", [20.0, 60.0, 200.0])
def test_a_peaked_row_keeps_its_tail(gap: float) -> None:
    """One token far above the others: log_tail −200 stays −200 to 0.2 %, however empty."""
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(2))
    logits[:, 17] += gap
    topk = of_logits(logits, 1)
    decoded = check(fitted(1), topk)
    expected = bound(topk.log_tail, 1 / 128)
    assert ((decoded.log_tail - topk.log_tail).abs() <= expected).all()
    assert float((expected / topk.log_tail.abs()).max()) < 0.003


def test_an_empty_tail_stays_empty() -> None:
    logits = torch.full((3, V), -torch.inf)
    logits[:, :8] = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    topk = of_logits(logits, 8)
    assert torch.isinf(topk.log_tail).all()
    decoded = check(fitted(8), topk)
    torch.testing.assert_close(decoded.log_probs.logsumexp(dim=1), torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [10, 11, 64])
def test_all_of_the_vocabulary(k: int) -> None:
    """k ≥ V: every tail is empty, in the calibration too."""
    field = fitted(k, vocabulary=10)
    decoded = check(field, truth(4, 7, 3.0, k, 10))
    assert decoded.ids.shape == (7, 10)
    assert torch.equal(decoded.ids.sort(dim=1).values, torch.arange(10).expand(7, 10))
    assert (decoded.log_tail == -torch.inf).all()


@pytest.mark.parametrize("shift", [-3000.0, -100.0, 100.0, 3000.0])
def test_teachers_whose_logits_lie_far_from_zero(shift: float) -> None:
    """log Z has a table around its own values, not around 0."""
    field = create_field("vision_topk", {"k": 4})

    def shifted(seed: int) -> TeacherOutput:
        logits = torch.randn(20, V, generator=torch.Generator().manual_seed(seed)) * 3 + shift
        return said(of_logits(logits, 4))

    ready = field.with_calibration(field.fit([shifted(seed) for seed in range(10)], torch.zeros(V, 1)).tensors)
    check(ready, shifted(99).topk["vision"])
    assert ready.encode(None, shifted(99))["coded"].numel() < 20 * 16


def test_ids_never_seen_have_a_place() -> None:
    logits = torch.zeros(30, V)
    logits[:, :3] = 5.0  # calibration sees ids 0, 1, 2 at the top and ties below them
    field = create_field("vision_topk", {"k": 2})
    ready = field.with_calibration(field.fit([said(of_logits(logits, 2))], torch.zeros(V, 1)).tensors)
    check(ready, of_logits(logits.flip(1), 2))


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    topk = truth(5, 3, 3.0, 8, V + 1)
    topk.ids[1, 2] = V
    with pytest.raises(KdcliError, match=f"field vision_topk: id {V} is beyond the {V} of its calibration"):
        fitted(8).encode(None, said(topk))


@pytest.mark.parametrize("column", ["log_probs", "log_tail", "log_z"])
def test_nan_is_refused(column: str) -> None:
    topk = truth(6, 3, 3.0, 8)
    getattr(topk, column)[1] = torch.nan
    with pytest.raises(KdcliError, match="cannot be coded"):
        fitted(8).encode(None, said(topk))


def test_what_is_cut_joins_the_tail() -> None:
    """One answer of the teacher serves fields of several k, each with its own exact tail."""
    wide, narrow = truth(7, 9, 2.0, 64), truth(7, 9, 2.0, 8)
    field = fitted(8)
    one, two = round_trip(field, wide), round_trip(field, narrow)
    for name in ("ids", "log_probs", "log_tail", "log_z"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), atol=1e-5, rtol=1e-5)


def test_calibration_needs_rows() -> None:
    field = create_field("vision_topk", {"k": 4})
    with pytest.raises(KdcliError, match=r"saw no vision rows.*: raise --calibration-rows, or leave it out"):
        field.fit([said(truth(1, 0, 1.0, 4))], torch.zeros(V, 1))
    with pytest.raises(KdcliError, match="needs its calibration"):
        field.encode(None, said(truth(1, 2, 1.0, 4)))


def test_bytes_a_row() -> None:
    """k = 8 over 30,000 tokens of a Zipf teacher: under 20 bytes a row, where plain storage takes 56."""
    prior = -1.1 * torch.arange(1, 30_001).log()

    def zipf(seed: int, rows: int) -> TeacherOutput:
        logits = torch.randn(rows, 30_000, generator=torch.Generator().manual_seed(seed)) * 2 + prior
        return said(of_logits(logits, 8))

    field = create_field("vision_topk", {"k": 8})
    ready = field.with_calibration(field.fit([zipf(s, 100) for s in range(6)], torch.zeros(30_000, 1)).tensors)
    assert ready.encode(None, zipf(50, 300))["coded"].numel() / 300 < 20
