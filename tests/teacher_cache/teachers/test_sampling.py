"""Both samplers against the distribution itself: unbiased, of the promised size, a pure function of key and seed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.capturing.behind import is_finite
from teacher_cache.records import TeacherOutput
from teacher_cache.signal_records import Sampled
from teacher_cache.teachers import sampling
from teacher_cache.teachers.sampling import sample_batch, sample_rows, uniforms
from teacher_cache.wants import Sampling, Wants

V, SEEDS = 40, 4000
KINDS = ("ordinary", "flat", "saturated", "two")
SIZES = {"threshold": 6, "random": 9}
PINNED = [[0.25592027878698387, 0.7290086570562007], [0.22263480281544756, 0.8169064781363933]]
each_sampler = pytest.mark.parametrize("sampler", SIZES)


def logits_of(kind: str) -> torch.Tensor:
    """float32 ``[V]``."""
    normal = torch.randn(V, generator=torch.Generator().manual_seed(3))
    return {
        "ordinary": normal * 2,
        "flat": torch.zeros(V),
        "saturated": normal + 60.0 * torch.nn.functional.one_hot(torch.tensor(7), V),
        "two": normal + 9.0 * torch.nn.functional.one_hot(torch.tensor([3, 30]), V).sum(0),
    }[kind]


def sampled(logits: torch.Tensor, sampler: str, size: int, seed: int = 0, key: str = "k") -> Sampled:
    """One answer to each row of logits ``[R, V]``: an identity head."""
    ticks = uniforms(seed, key, "vision", len(logits), size if sampler == "random" else 1)
    return sample_rows(logits, torch.eye(logits.shape[1]), sampler, size, ticks)


def dense(answer: Sampled, vocabulary: int = V) -> torch.Tensor:
    """Weights by id, float64 ``[R, V]``."""
    wide = torch.zeros(len(answer), vocabulary, dtype=torch.float64)
    return wide.scatter_add_(1, answer.ids, answer.weights.double())


@each_sampler
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_seeds_is_the_distribution(sampler: str, kind: str) -> None:
    logits = logits_of(kind).expand(SEEDS, V).clone()
    answer = sampled(logits, sampler, SIZES[sampler])
    p = logits[0].double().softmax(0)
    weights = dense(answer)
    if sampler == "random":
        one, variance = 1 / SIZES[sampler], p * (1 - p) / SIZES[sampler]
    else:
        one = float(answer.weights[0].min())  # τ
        variance = p * (one - p).clamp_min(0)
    # Below ten expected meetings an id's count is not normal: one meeting more or less is allowed.
    allowed = 4 * (variance / SEEDS).sqrt() + torch.where(p * SEEDS < 10 * one, one / SEEDS, 1e-6)
    assert ((weights.mean(dim=0) - p).abs() <= allowed).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(SEEDS, dtype=torch.float64), atol=1e-6, rtol=0)
    entropy = torch.special.entr(p).sum().float()
    torch.testing.assert_close(answer.entropy, entropy.expand(SEEDS), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["ordinary", "flat", "two"])
def test_threshold_varies_less_than_random_at_equal_ids(kind: str) -> None:
    logits = logits_of(kind).expand(SEEDS, V).clone()
    drawn = sampled(logits, "random", 9)
    kept = (drawn.weights > 0).sum(dim=1).double().mean()
    ours = sampled(logits, "threshold", math.floor(kept))
    p = logits[0].double().softmax(0)
    variance = [(dense(one) - p).square().sum(dim=1).mean() for one in (ours, drawn)]
    assert variance[0] < variance[1], variance
    if kind == "two":
        assert variance[0] < 0.1 * variance[1]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1e-3, 1.0, 8.0, 100.0]), st.integers(1, 60), st.integers(2, 50))
def test_exactly_k_distinct_ids_of_weight_p_or_tau(seed: int, scale: float, k: int, vocabulary: int) -> None:
    logits = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale
    p = logits.double().softmax(dim=1)
    answer = sampled(logits, "threshold", k, seed)
    assert answer.ids.shape == answer.weights.shape == (5, min(k, vocabulary))
    for row in range(5):
        held = answer.weights[row] > 0
        ids, weights = answer.ids[row, held], answer.weights[row, held].double()
        # Masses near the end of float32 may round to none.
        assert min(k, int((p[row] > 1e-30).sum())) <= len(ids) <= min(k, int((p[row] > 0).sum()))
        assert len(ids.unique()) == len(ids)
        torch.testing.assert_close(weights, p[row, ids].maximum(weights.min()), atol=1e-6, rtol=1e-5)
        assert weights.sum() == pytest.approx(1.0, abs=2e-6)


@each_sampler
def test_fewer_ids_with_mass_than_places(sampler: str) -> None:
    logits = torch.full((3, V), -1e5)
    logits[:, [4, 11, 20]] = torch.tensor([1.0, 0.0, -1.0])
    answer = sampled(logits, sampler, 200)
    p = torch.tensor([1.0, 0.0, -1.0]).softmax(0)
    assert torch.equal((answer.weights > 0).sum(dim=1), torch.full((3,), 3))
    wide = dense(answer)
    assert (wide[:, [4, 11, 20]].sum(dim=1) - 1).abs().max() < 1e-6
    if sampler == "threshold":
        torch.testing.assert_close(wide[0, [4, 11, 20]].float(), p)


def test_as_many_places_as_ids_are_the_distribution_itself() -> None:
    for kind in ("ordinary", "flat"):
        logits = logits_of(kind)[None]
        for k in (V, V + 1, 500):
            torch.testing.assert_close(
                dense(sampled(logits, "threshold", k))[0], logits[0].double().softmax(0), atol=1e-6, rtol=1e-5
            )


@each_sampler
def test_rows_are_a_function_of_key_and_seed_alone(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, among others, in another order or in other chunks: the same ids and weights."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, V, generator=generator) * 3 for count in (5, 0, 7)]
    keys, want = ["a", "b", "c"], Wants(sampled={"vision": Sampling(sampler, 8, 3)})

    def ask(order: list[int]) -> dict[str, Sampled]:
        joined = {"vision": torch.cat([rows[i] for i in order])}
        counts = {"vision": tuple(len(rows[i]) for i in order)}
        said = sample_batch(joined, torch.eye(V), [keys[i] for i in order], counts, want)["vision"]
        return {keys[i]: one for i, one in zip(order, said)}

    together = ask([0, 1, 2])
    assert together["b"].ids.shape[0] == 0
    for order in ([2, 0, 1], [0], [2]):
        for chunk_bytes in (4 * V, 12 * V, 1 << 20):
            monkeypatch.setattr(sampling, "CHUNK_BYTES", chunk_bytes)
            for key, one in ask(order).items():
                assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(together[key]).values()))


def test_uniforms_are_pinned_and_differ_by_everything() -> None:
    pinned = uniforms(0, "000000007-ab", "vision", 2, 2)
    assert pinned.dtype == torch.float64
    assert pinned.tolist() == PINNED
    assert torch.equal(uniforms(0, "000000007-ab", "vision", 5, 2)[:2], pinned)
    others = [(1, "000000007-ab", "vision"), (0, "000000008-ab", "vision"), (0, "000000007-ab", "response")]
    assert all(not torch.equal(uniforms(*other, 2, 2), pinned) for other in others)
    many = uniforms(5, "key", "response", 20_000, 1)
    assert many.min() >= 0 and many.max() < 1
    assert abs(float(many.mean()) - 0.5) < 4 * (1 / 12 / 20_000) ** 0.5


@each_sampler
def test_nan_rows_are_refused_upstream(sampler: str) -> None:
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(5))
    logits[1, 4] = math.nan
    answer = sampled(logits, sampler, 5)
    assert torch.isfinite(answer.entropy).tolist() == [True, False, True]
    assert not is_finite(TeacherOutput(sampled={"vision": answer}))
    assert is_finite(TeacherOutput(sampled={"vision": answer[[0, 2]]}))


@each_sampler
def test_no_rows(sampler: str) -> None:
    answer = sampled(torch.zeros(0, V), sampler, 6)
    assert answer.ids.shape == answer.weights.shape == (0, 6)
    assert answer.ids.dtype == torch.int64 and answer.entropy.shape == (0,)


def test_joined_records_are_padded_to_the_widest() -> None:
    a, b = (
        sampled(logits_of("ordinary")[None], "threshold", 4),
        sampled(logits_of("flat").expand(2, V).clone(), "threshold", 6),
    )
    both = Sampled.join([a, b])
    assert both.ids.shape == (3, 6) and len(both) == 3
    assert torch.equal(dense(both), torch.cat([dense(a), dense(b)]))
    assert torch.equal(both[1:].ids, b.ids) and both[0:1].weights[0, 4:].tolist() == [0, 0]
