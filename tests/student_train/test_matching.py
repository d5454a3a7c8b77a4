"""Matching cost, assignment and matched rows against dense float64 references and brute force."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from student_train.distributions import DenseTeacher, HeadAndTail
from student_train.group_costs import column_sampled_costs
from student_train.losses import distances, matching
from student_train.losses.matching import (
    UNMATCHED,
    hidden_cost,
    manhattan_cost,
    match,
    matched_reverse_kl,
)
from student_train.match_groups import MatchGroup
from teacher_cache.errors import KdcliError
from teacher_cache.models.head import topk_rows
from tests.close import assert_close
from tests.student_train import plain_losses as plain

VOCABULARY, PADDED, WIDTH, TEACHER_WIDTH = 61, 66, 7, 11


def sides(teacher_rows: int, student_rows: int, seed: int = 0) -> tuple[DenseTeacher, torch.Tensor, torch.Tensor]:
    """(teacher, student hidden, student head with padding rows)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    teacher = DenseTeacher(draw(teacher_rows, TEACHER_WIDTH), draw(VOCABULARY, TEACHER_WIDTH))
    return teacher, draw(student_rows, WIDTH), draw(PADDED, WIDTH)


def dense_cost(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """All differences at once, over the columns that the teacher has."""
    return plain.manhattan(teacher, student[:, : teacher.shape[1]])


@pytest.mark.parametrize("chunk", [1, 3, 1000], ids="rows of a chunk {}".format)
@pytest.mark.parametrize("columns", [1, 7, 2048])
def test_the_cost_is_the_dense_one(monkeypatch: pytest.MonkeyPatch, chunk: int, columns: int) -> None:
    """Padding columns of the student's head do not count, however rows and columns are cut."""
    monkeypatch.setattr(matching, "CHUNK_BYTES", 4 * PADDED * chunk)
    monkeypatch.setattr(distances, "COLUMNS", columns)
    teacher, hidden, head = sides(9, 5)
    logits = [teacher.hidden.double() @ teacher.head.double().T, hidden.double() @ head.double().T]
    cost = manhattan_cost(teacher, hidden.requires_grad_(), head)
    assert cost.shape == (9, 5) and cost.dtype == torch.float64 and not cost.requires_grad
    torch.testing.assert_close(cost, dense_cost(*logits), rtol=1e-6, atol=1e-5)
    probs = [logits[0].softmax(1), logits[1][:, :VOCABULARY].softmax(1)]
    torch.testing.assert_close(manhattan_cost(teacher, hidden, head, "probs"), dense_cost(*probs), rtol=1e-5, atol=1e-6)


def test_the_cost_of_a_shorter_head() -> None:
    teacher, hidden, head = sides(4, 3)
    logits = [teacher.hidden.double() @ teacher.head.double().T, hidden.double() @ head[:50].double().T]
    expected = dense_cost(logits[0][:, :50], logits[1])
    torch.testing.assert_close(manhattan_cost(teacher, hidden, head[:50]), expected, rtol=1e-6, atol=1e-5)


def test_the_cost_is_on_raw_logits() -> None:
    """A constant added to a row's logits changes no distribution, but the cost."""
    teacher, hidden, head = sides(4, 3)
    ones = torch.ones(PADDED, 1)
    shifted = manhattan_cost(teacher, torch.cat([hidden, torch.full((3, 1), 50.0)], 1), torch.cat([head, ones], 1))
    assert (shifted > manhattan_cost(teacher, hidden, head) + 1000).all()


def test_bfloat16_states() -> None:
    teacher, hidden, head = sides(6, 4)
    hidden = hidden.bfloat16()
    narrow = hidden.double() @ head.bfloat16().double().T
    expected = dense_cost(teacher.hidden.double() @ teacher.head.double().T, narrow)
    torch.testing.assert_close(manhattan_cost(teacher, hidden, head), expected, rtol=1e-5, atol=1e-4)


def test_only_known_spaces() -> None:
    with pytest.raises(KdcliError, match="logits, probs"):
        manhattan_cost(*sides(2, 2), space="cosine")


def column_sampled_cost(
    teacher: DenseTeacher, hidden: torch.Tensor, head: torch.Tensor, columns: int, generator: torch.Generator
) -> torch.Tensor:
    """Of all rows as one group."""
    every = MatchGroup(torch.arange(len(teacher)), torch.arange(len(hidden)))
    (cost,) = column_sampled_costs(teacher, hidden, head, [every], columns, generator)
    return cost


def test_sampled_columns_estimate_the_cost_without_bias() -> None:
    """The mean over many draws meets the exact cost within its error; padding columns are never drawn."""
    teacher, hidden, head = sides(6, 4)
    exact = manhattan_cost(teacher, hidden, head)
    source = torch.Generator().manual_seed(0)
    draws = torch.stack([column_sampled_cost(teacher, hidden, head, 9, source) for _ in range(3000)])
    error = draws.std(dim=0) / len(draws) ** 0.5
    assert draws.dtype == torch.float64 and draws.shape[1:] == exact.shape
    assert ((draws.mean(dim=0) - exact).abs() < 5 * error).all() and (error < 0.02 * exact).all()


def test_all_columns_are_the_cost_itself() -> None:
    teacher, hidden, head = sides(6, 4)
    for columns in (VOCABULARY, 10_000):
        cost = column_sampled_cost(teacher, hidden.requires_grad_(), head.requires_grad_(), columns, torch.Generator())
        torch.testing.assert_close(cost, manhattan_cost(teacher, hidden, head))
        assert not cost.requires_grad


def test_sampled_columns_follow_their_generator() -> None:
    teacher, hidden, head = sides(6, 4)
    first, again, other = (
        column_sampled_cost(teacher, hidden, head, 9, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)
    )
    assert first.equal(again) and not first.equal(other)


def test_the_cost_on_hidden_states() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, mapped = torch.randn(6, 11, generator=generator), torch.randn(4, 11, generator=generator)
    cost = hidden_cost(teacher.bfloat16(), mapped.requires_grad_())
    torch.testing.assert_close(cost, plain.manhattan(teacher.bfloat16(), mapped.detach()), rtol=1e-5, atol=1e-5)
    assert not cost.requires_grad


@pytest.mark.parametrize("shape", [(7, 7), (9, 4), (4, 9), (1, 1)])
@pytest.mark.parametrize("levels", [2, 5, 1000], ids="{} different costs".format)
def test_the_match_is_scipys(shape: tuple[int, int], levels: int) -> None:
    """Pair by pair, also where many assignments cost the same."""
    cost = torch.randint(levels, shape, generator=torch.Generator().manual_seed(levels)).double()
    teachers, students = linear_sum_assignment(cost.numpy())
    expected = {int(student): int(teacher) for teacher, student in zip(teachers, students)}
    assert {i: t for i, t in enumerate(match(cost).tolist()) if t != UNMATCHED} == expected


@pytest.mark.parametrize("seed", range(5))
def test_the_match_is_the_best_of_all(seed: int) -> None:
    cost = torch.rand(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matched = match(cost)
    best = min(sum(float(cost[t, s]) for s, t in enumerate(chosen)) for chosen in permutations(range(6), 4))
    assert len(set(matched.tolist())) == 4
    assert float(cost[matched, torch.arange(4)].sum()) == pytest.approx(best, rel=1e-12)


def test_rows_of_the_teacher_in_another_order_are_found_again() -> None:
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))[:8]
    teacher, _, _ = sides(20, 8)
    student = teacher[order]
    assert match(manhattan_cost(teacher, student.hidden, student.head)).equal(order)


def test_more_student_rows_than_teacher_rows() -> None:
    cost = torch.rand(3, 5, generator=torch.Generator().manual_seed(4))
    matched = match(cost)
    assert sorted(matched.tolist()) == [UNMATCHED, UNMATCHED, 0, 1, 2]
    assert match(cost.T).shape == (3,) and (match(cost.T) >= 0).all()


@pytest.mark.parametrize("shape", [(0, 0), (4, 0)])
def test_no_rows(shape: tuple[int, int]) -> None:
    teacher, hidden, head = sides(*shape)
    cost = manhattan_cost(teacher, hidden, head)
    assert cost.shape == shape and match(cost).shape == (0,)
    assert matched_reverse_kl(teacher, hidden @ head.T, match(cost)).shape == (0,)


def test_a_cost_without_meaning_is_refused() -> None:
    with pytest.raises(KdcliError, match="not finite"):
        match(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_matched_rows_are_distilled(temperature: float) -> None:
    teacher, hidden, head = sides(9, 5)
    logits = (hidden @ head.T).requires_grad_()
    matched = match(manhattan_cost(teacher, hidden, head))
    values = matched_reverse_kl(teacher, logits, matched, temperature)
    values.sum().backward()
    wide = logits.detach().double().requires_grad_()
    log_t = (teacher.hidden.double() @ teacher.head.double().T / temperature).log_softmax(1)[matched]
    expected = plain.reverse_kl(log_t, wide[:, :VOCABULARY] / temperature)
    expected.sum().backward()
    assert_close(values.double(), expected, 2e-5)
    assert_close(logits.grad.double(), wide.grad, 2e-5)


def test_unmatched_rows_have_no_loss() -> None:
    teacher, hidden, head = sides(3, 5)
    logits = (hidden @ head.T).requires_grad_()
    matched = match(manhattan_cost(teacher, hidden, head))
    values = matched_reverse_kl(teacher, logits, matched)
    values.sum().backward()
    without = matched == UNMATCHED
    assert without.sum() == 2 and not values[without].any() and not logits.grad[without].any()
    assert (values[~without] > 0).all() and logits.grad[~without].any(dim=1).all()


def test_matched_rows_of_a_top_k_teacher() -> None:
    """The cost needs all logits, the loss does not."""
    teacher, hidden, head = sides(9, 5)
    logits = hidden @ head.T
    matched = match(manhattan_cost(teacher, hidden, head))
    signal = HeadAndTail(topk_rows(teacher.hidden, teacher.head, 8), VOCABULARY)
    bound, exact = matched_reverse_kl(signal, logits, matched), matched_reverse_kl(teacher, logits, matched)
    assert (bound < exact).all() and (bound > 0).all()
