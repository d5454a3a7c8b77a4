"""The divergences against their definition in float64, values and gradients: saturated rows, empty tails, padding columns."""

from __future__ import annotations

import pytest
import torch

from student_train.losses.divergences import (
    _ForwardKL,
    cross_entropy,
    forward_kl,
    forward_kl_bucket,
    forward_kl_bucket_plain,
    forward_kl_dense,
)
from student_train.losses.relation import relation_cosine
from student_train.teacher_view import DenseTeacher, HeadAndTail
from teacher_cache.errors import CompatibilityError
from teacher_cache.teachers.head import topk_rows

VOCABULARY = 37


def plain_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """The definition: Σ p_t (log p_t − log p_s), in the dtype of its arguments."""
    log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


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
    return teacher, student


def head_and_tail(logits: torch.Tensor, k: int) -> HeadAndTail:
    """The top-k summary that a capture stores of these logits."""
    return HeadAndTail(topk_rows(logits, torch.eye(logits.shape[1]), k), logits.shape[1])


@pytest.mark.parametrize("kind", ["ordinary", "saturated", "equal", "shifted"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_dense_kl_is_the_definition(kind: str, temperature: float) -> None:
    teacher, student = logits_of(kind, 0)
    student.requires_grad_()
    values = forward_kl_dense((teacher / temperature).log_softmax(dim=1), student, temperature)
    weights = torch.linspace(0.5, 2.0, len(teacher))
    (values * weights).sum().backward()
    wide = student.detach().double().requires_grad_()
    expected = plain_kl(teacher.double() / temperature, wide / temperature)
    (expected * weights).sum().backward()
    torch.testing.assert_close(values.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=2e-4, atol=2e-6)


def test_written_gradient_passes_gradcheck() -> None:
    teacher, student = logits_of("ordinary", 1, rows=4)
    student = student.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: _ForwardKL.apply(teacher.double().log_softmax(dim=1), logits), student
    )


def test_bfloat16_logits_are_widened_before_the_softmax() -> None:
    teacher, student = logits_of("ordinary", 2)
    narrow = student.bfloat16().requires_grad_()
    values = forward_kl_dense(teacher.bfloat16().float().log_softmax(dim=1), narrow)
    values.sum().backward()
    expected = plain_kl(teacher.bfloat16().double(), narrow.detach().double())
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    assert narrow.grad.dtype == torch.bfloat16


def test_padding_columns_of_the_student_do_not_exist() -> None:
    teacher, student = logits_of("ordinary", 3)
    wide = torch.cat([student, torch.full((len(student), 5), 80.0)], dim=1).requires_grad_()
    for signal in (DenseTeacher(teacher, torch.eye(VOCABULARY)), head_and_tail(teacher, 9)):
        values = forward_kl(signal, wide)
        torch.testing.assert_close(values, forward_kl(signal, student))
        (gradient,) = torch.autograd.grad(values.sum(), wide)
        assert not gradient[:, VOCABULARY:].any()


@pytest.mark.parametrize("kind", ["ordinary", "saturated", "equal"])
@pytest.mark.parametrize("k", [1, 8, VOCABULARY - 1])
def test_bucket_kl_in_float64_terms(kind: str, k: int) -> None:
    """Everything outside the head is one outcome on both sides."""
    teacher, student = logits_of(kind, 4)
    student.requires_grad_()
    signal = head_and_tail(teacher, k)
    values = forward_kl_bucket(signal, student)
    values.sum().backward()
    wide = student.detach().double().requires_grad_()
    outside = torch.ones_like(wide, dtype=torch.bool).scatter(1, signal.topk.ids, False)

    def bucketed(logits: torch.Tensor) -> torch.Tensor:
        rest = logits.masked_fill(~outside, -torch.inf).logsumexp(1, keepdim=True)
        return torch.cat([logits.gather(1, signal.topk.ids), rest], dim=1)

    expected = plain_kl(bucketed(teacher.double()), bucketed(wide))
    expected.sum().backward()
    torch.testing.assert_close(values.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=2e-4, atol=5e-6)


@pytest.mark.parametrize("kind", ["ordinary", "saturated", "equal"])
@pytest.mark.parametrize("k", [1, 8, VOCABULARY - 1, VOCABULARY])
def test_bucket_kl_and_its_written_gradient_equal_the_plain_twin(kind: str, k: int) -> None:
    teacher, student = logits_of(kind, 8)
    signal, weights = head_and_tail(teacher, k), torch.rand(len(student))
    student.requires_grad_()
    fast, plain = forward_kl_bucket(signal, student), forward_kl_bucket_plain(signal, student)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad((fast * weights).sum(), student)
    (expected,) = torch.autograd.grad((plain * weights).sum(), student)
    torch.testing.assert_close(gradient, expected, rtol=2e-4, atol=5e-6)


@pytest.mark.parametrize("kind", ["ordinary", "saturated"])
def test_bucket_with_the_whole_vocabulary_is_the_dense_kl(kind: str) -> None:
    teacher, student = logits_of(kind, 5)
    student.requires_grad_()
    signal = head_and_tail(teacher, VOCABULARY)
    assert torch.isneginf(signal.topk.log_tail).all()
    values = forward_kl_bucket(signal, student)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    (expected,) = torch.autograd.grad(forward_kl_dense(teacher.log_softmax(dim=1), student).sum(), student)
    torch.testing.assert_close(values, forward_kl_dense(teacher.log_softmax(dim=1), student), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=2e-6)


def test_bucket_error_is_exactly_the_tails_own_divergence() -> None:
    """KL = bucket + tail mass · KL(tail_t ‖ tail_s), so the bucket is a lower bound that closes as k grows."""
    teacher, student = logits_of("ordinary", 6, rows=50)
    dense = plain_kl(teacher.double(), student.double())
    before = torch.full_like(dense, torch.inf)
    for k in (1, 4, 16, 32):
        signal = head_and_tail(teacher, k)
        gap = dense - forward_kl_bucket(signal, student).double()
        outside = torch.ones_like(teacher, dtype=torch.bool).scatter(1, signal.topk.ids, False)
        tails = [side.double()[outside].reshape(50, -1) for side in (teacher, student)]
        expected = signal.topk.log_tail.double().exp() * plain_kl(*tails)
        torch.testing.assert_close(gap, expected, rtol=1e-4, atol=2e-5)
        assert (gap > -2e-5).all() and (gap < before + 2e-5).all()
        before = gap


def test_temperature_needs_more_than_a_head() -> None:
    teacher, student = logits_of("ordinary", 7)
    with pytest.raises(CompatibilityError, match="temperature 1 only"):
        forward_kl(head_and_tail(teacher, 4), student, temperature=2.0)


def test_no_rows_give_no_values() -> None:
    empty = torch.zeros(0, VOCABULARY)
    assert forward_kl(DenseTeacher(empty, torch.eye(VOCABULARY)), empty).shape == (0,)
    assert forward_kl(head_and_tail(empty, 4), empty).shape == (0,)
    assert cross_entropy(empty, torch.zeros(0, dtype=torch.int64)).shape == (0,)


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
    torch.testing.assert_close(states.grad.double(), wide.grad, rtol=1e-4, atol=1e-7)
