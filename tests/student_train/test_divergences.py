"""The divergences against their definition in float64, values and gradients: saturated rows, empty tails, padding columns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from student_train.distributions import DenseTeacher, HeadAndTail
from student_train.losses import divergences, written
from student_train.losses.divergences import cross_entropy, forward_kl
from student_train.losses.relation import relation_cosine
from teacher_cache.errors import CompatibilityError
from teacher_cache.models.head import topk_rows
from tests.close import assert_close
from tests.student_train import plain_losses as plain

VOCABULARY = 37
KINDS = ("ordinary", "saturated", "equal", "shifted", "one-hot")
KNOBS = {
    "forward_kl": {},
    "reverse_kl": {},
    "jensen_shannon": {"beta": 0.3},
    "skew_kl": {"skew": 0.1},
    "skew_reverse_kl": {"skew": 0.1},
}
each_divergence = pytest.mark.parametrize("name", KNOBS)
Loss = Callable[..., torch.Tensor]


def product(name: str) -> Loss:
    """loss(teacher, student logits, temperature=1.0)."""
    return partial(getattr(divergences, name), **KNOBS[name])


def twin(name: str) -> Loss:
    """loss(teacher log-probs, student logits), by autograd."""
    return partial(getattr(plain, name), **KNOBS[name])


def definition(name: str, p_t: torch.Tensor, p_s: torch.Tensor) -> torch.Tensor:
    """The papers' formulas on probabilities above 0."""

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p * (p / q).log()).sum(1)

    middle = 0.3 * p_t + 0.7 * p_s
    return {
        "forward_kl": lambda: kl(p_t, p_s),
        "reverse_kl": lambda: kl(p_s, p_t),
        "jensen_shannon": lambda: 0.3 * kl(p_t, middle) + 0.7 * kl(p_s, middle),
        "skew_kl": lambda: kl(p_t, 0.1 * p_t + 0.9 * p_s),
        "skew_reverse_kl": lambda: kl(p_s, 0.9 * p_t + 0.1 * p_s),
    }[name]()


def logits_of(kind: str, seed: int, rows: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher and student logits, float32."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(rows, VOCABULARY, generator=generator) * 3
    student = torch.randn(rows, VOCABULARY, generator=generator) * 3
    if kind == "saturated":  # one-hot on different columns, differences of 2e4
        teacher, student = teacher.sign() * 1e4, student.sign() * 1e4
        teacher[:, 5], student[:, 7] = 2e4, 2e4
    if kind == "equal":
        student = teacher.clone()
    if kind == "shifted":  # a constant is no information
        student = teacher + 500.0
    if kind == "one-hot":  # a teacher that is sure, a student that is not
        teacher = teacher + 40.0 * torch.nn.functional.one_hot(teacher.argmax(1), VOCABULARY)
    return teacher, student


def head_and_tail(logits: torch.Tensor, k: int) -> HeadAndTail:
    """The top-k summary that a capture stores of these logits."""
    return HeadAndTail(topk_rows(logits, torch.eye(logits.shape[1]), k), logits.shape[1])


def dense(logits: torch.Tensor) -> DenseTeacher:
    return DenseTeacher(logits, torch.eye(logits.shape[1]))


def with_gradient(values: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and the gradient of their sum under unequal weights, both in float64."""
    weights = torch.linspace(0.5, 2.0, len(values))
    (gradient,) = torch.autograd.grad((values * weights.to(values.dtype)).sum(), logits)
    return values.double(), gradient.double()


def check(
    found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], kind: str = "ordinary"
) -> None:
    """float32 arithmetic is all that differs: a large value's rounding is in its row's gradient too.

    Shifted by 500, logits carry the rounding of numbers of that size, and probabilities the share of it.
    """
    shift = 500 * 2.0**-23 if kind == "shifted" else 0.0
    torch.testing.assert_close(found[0], expected[0], rtol=2e-5, atol=2e-5 + shift)
    torch.testing.assert_close(found[1], expected[1], rtol=2e-4, atol=1e-5 + shift)


@each_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_definition(name: str, temperature: float) -> None:
    teacher, student = logits_of("ordinary", 0)
    student.requires_grad_()
    wide = student.detach().double().requires_grad_()
    p_t, p_s = (teacher.double() / temperature).softmax(1), (wide / temperature).softmax(1)
    expected = with_gradient(definition(name, p_t, p_s), wide)
    check(with_gradient(product(name)(dense(teacher), student, temperature=temperature), student), expected)


@each_divergence
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_written_gradient_is_its_twins(name: str, kind: str, temperature: float) -> None:
    teacher, student = logits_of(kind, 0)
    student.requires_grad_()
    wide = student.detach().double().requires_grad_()
    expected = twin(name)((teacher.double() / temperature).log_softmax(1), wide / temperature)
    assert torch.isfinite(expected).all()
    found = product(name)(dense(teacher), student, temperature=temperature)
    check(with_gradient(found, student), with_gradient(expected, wide), kind)


@each_divergence
def test_gradcheck(name: str) -> None:
    teacher, student = logits_of("ordinary", 1, rows=4)
    formula = partial(getattr(written, name), **KNOBS[name])
    log_probs, student = teacher.double().log_softmax(dim=1), student.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: written.WithGradient.apply(formula, (log_probs,), logits), student)


def test_gradcheck_of_the_merged_tail() -> None:
    teacher, student = logits_of("ordinary", 1, rows=4)
    ids, student = teacher.topk(5, dim=1).indices, student.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: written.MergeTail.apply(ids, logits), student)


@each_divergence
@pytest.mark.parametrize("signal", [dense, partial(head_and_tail, k=9)], ids=["dense", "top-k"])
def test_bfloat16_logits_are_widened_before_the_softmax(name: str, signal: Callable[..., object]) -> None:
    teacher, student = logits_of("ordinary", 2)
    narrow, same = student.bfloat16().requires_grad_(), student.bfloat16().float().requires_grad_()
    values = product(name)(signal(teacher), narrow)
    torch.testing.assert_close(values, product(name)(signal(teacher), same))
    values.sum().backward()
    assert values.dtype == torch.float32 and narrow.grad.dtype == torch.bfloat16


@each_divergence
@pytest.mark.parametrize("signal", [dense, partial(head_and_tail, k=9)], ids=["dense", "top-k"])
def test_padding_columns_of_the_student_do_not_exist(name: str, signal: Callable[..., object]) -> None:
    teacher, student = logits_of("ordinary", 3)
    wide = torch.cat([student, torch.full((len(student), 5), 80.0)], dim=1).requires_grad_()
    values = product(name)(signal(teacher), wide)
    torch.testing.assert_close(values, product(name)(signal(teacher), student))
    (gradient,) = torch.autograd.grad(values.sum(), wide)
    assert not gradient[:, VOCABULARY:].any()


@each_divergence
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 8, VOCABULARY - 1, VOCABULARY])
def test_top_k_sees_everything_outside_the_head_as_one_outcome(name: str, kind: str, k: int) -> None:
    teacher, student = logits_of(kind, 4)
    student.requires_grad_()
    signal = head_and_tail(teacher, k)
    wide = student.detach().double().requires_grad_()
    merged = plain.merge_tail(signal.topk.ids, teacher.double()).log_softmax(1)
    expected = twin(name)(merged, plain.merge_tail(signal.topk.ids, wide))
    assert torch.isfinite(expected).all()
    check(with_gradient(product(name)(signal, student), student), with_gradient(expected, wide), kind)


@each_divergence
@pytest.mark.parametrize("kind", ["ordinary", "saturated", "one-hot"])
def test_top_k_with_the_whole_vocabulary_is_dense(name: str, kind: str) -> None:
    teacher, student = logits_of(kind, 5)
    student.requires_grad_()
    signal = head_and_tail(teacher, VOCABULARY)
    assert torch.isneginf(signal.topk.log_tail).all()
    found = with_gradient(product(name)(signal, student), student)
    check(found, with_gradient(product(name)(dense(teacher), student), student), kind)


@each_divergence
def test_an_empty_tail_of_the_teacher_stays_finite(name: str) -> None:
    """No mass outside the head, where the student has some: the reverse KL is infinite, ours large and its gradient finite."""
    teacher, student = logits_of("ordinary", 6)
    signal = head_and_tail(teacher, 4)
    signal.topk.log_tail.fill_(-torch.inf)
    student.requires_grad_()
    values, gradient = with_gradient(product(name)(signal, student), student)
    assert torch.isfinite(values).all() and torch.isfinite(gradient).all()
    assert (values > 100.0).all() == (name == "reverse_kl")


@each_divergence
def test_top_k_is_a_lower_bound_that_closes(name: str) -> None:
    """Merging outcomes never adds divergence (log-sum inequality), and a longer head merges fewer."""
    teacher, student = logits_of("ordinary", 6, rows=50)
    exact = twin(name)(teacher.double().log_softmax(1), student.double())
    before = torch.full_like(exact, torch.inf)
    for k in (1, 4, 16, 32, VOCABULARY):
        gap = exact - product(name)(head_and_tail(teacher, k), student).double()
        assert (gap > -2e-5).all() and (gap < before + 2e-5).all()
        before = gap
    assert gap.abs().max() < 2e-5


def test_the_forward_bound_loses_exactly_the_tails_own_divergence() -> None:
    """KL = bucket + tail mass · KL(tail_t ‖ tail_s)."""
    teacher, student = logits_of("ordinary", 6, rows=50)
    exact = plain.forward_kl(teacher.double().log_softmax(1), student.double())
    for k in (1, 4, 16, 32):
        signal = head_and_tail(teacher, k)
        gap = exact - forward_kl(signal, student).double()
        outside = torch.ones_like(teacher, dtype=torch.bool).scatter(1, signal.topk.ids, False)
        tails = [side.double()[outside].reshape(50, -1) for side in (teacher, student)]
        expected = signal.topk.log_tail.double().exp() * plain.forward_kl(tails[0].log_softmax(1), tails[1])
        torch.testing.assert_close(gap, expected, rtol=1e-4, atol=2e-5)


def test_limits_of_jensen_shannon() -> None:
    """Over β it tends to the forward KL as β → 0, over 1−β to the reverse as β → 1; symmetric and at most log 2 at one half."""
    teacher, student = (one.double() for one in logits_of("ordinary", 7))
    log_t, log_s = teacher.log_softmax(1), student.log_softmax(1)
    small = 1e-8
    forward, reverse = plain.forward_kl(log_t, student), plain.reverse_kl(log_t, student)
    torch.testing.assert_close(written.jensen_shannon(log_t, student, small)[0] / small, forward, rtol=2e-2, atol=0)
    torch.testing.assert_close(written.jensen_shannon(log_t, student, 1 - small)[0] / small, reverse, rtol=2e-2, atol=0)
    half = written.jensen_shannon(log_t, student, 0.5)[0]
    torch.testing.assert_close(half, written.jensen_shannon(log_s, teacher, 0.5)[0])
    assert (half < torch.log(torch.tensor(2.0))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_skews_are_bounded(kind: str) -> None:
    """At most −log 0.1, however far apart both sides are: this is what the skew is for."""
    teacher, student = logits_of(kind, 8)
    for loss in (divergences.skew_kl, divergences.skew_reverse_kl):
        values = loss(dense(teacher), student)
        assert (values > -1e-6).all() and (values < -torch.log(torch.tensor(0.1)) + 1e-5).all()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_mixture_has_both_sides(share: float) -> None:
    teacher, student = logits_of("ordinary", 7)
    for loss in (divergences.jensen_shannon, divergences.skew_kl, divergences.skew_reverse_kl):
        with pytest.raises(ValueError, match=r"in \(0, 1\)"):
            loss(dense(teacher), student, share)


@each_divergence
def test_temperature_needs_more_than_a_head(name: str) -> None:
    teacher, student = logits_of("ordinary", 7)
    with pytest.raises(CompatibilityError, match="temperature 1 only"):
        product(name)(head_and_tail(teacher, 4), student, temperature=2.0)


@each_divergence
def test_no_rows_give_no_values(name: str) -> None:
    empty = torch.zeros(0, VOCABULARY, requires_grad=True)
    for signal in (dense(empty.detach()), head_and_tail(empty.detach(), 4)):
        values = product(name)(signal, empty)
        assert values.shape == (0,) and torch.autograd.grad(values.sum(), empty)[0].shape == (0, VOCABULARY)
    assert cross_entropy(empty, torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_no_divergence_from_what_is_no_distribution() -> None:
    with pytest.raises(TypeError, match="no divergence from"):
        forward_kl([1.0], torch.zeros(1, VOCABULARY))  # type: ignore[arg-type]


def test_relation_is_one_minus_cosine_also_for_huge_logits() -> None:
    """Gram entries of 1e4-sized logits over a real vocabulary reach 1e13: far beyond float16, and their squares beyond 1e26."""
    generator = torch.Generator().manual_seed(8)
    teacher = torch.randn(6, 50, generator=generator, dtype=torch.float64) * 1e7
    student = torch.randn(6, 50, generator=generator, dtype=torch.float64) * 1e7
    grams = [side @ side.T for side in (teacher, student)]
    expected = 1 - torch.nn.functional.cosine_similarity(grams[0].flatten(), grams[1].flatten(), dim=0)
    value = relation_cosine(grams[0].float(), grams[1].float())
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert relation_cosine(grams[0].float(), grams[0].float() * 1e-9).abs() < 1e-6


def test_relation_gradient() -> None:
    generator = torch.Generator().manual_seed(9)
    target = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    states = torch.randn(5, 8, generator=generator).requires_grad_()
    relation_cosine(target.float(), states @ states.T).backward()
    wide = states.detach().double().requires_grad_()
    gram = (wide @ wide.T).flatten()
    (1 - torch.dot(gram / gram.norm(), target.flatten() / target.norm())).backward()
    assert_close(states.grad.double(), wide.grad, 1e-5)
