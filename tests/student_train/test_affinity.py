"""Vision-language affinities against float64 references, values and gradients."""

from __future__ import annotations

import pytest
import torch

from student_train.losses.affinity import affinity_loss, cosine_affinity
from student_train.losses.matching import UNMATCHED
from tests.close import assert_all_close


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth_l1(difference: torch.Tensor, beta: float) -> torch.Tensor:
    size = difference.abs()
    return torch.where(size < beta, difference**2 / (2 * beta), size - beta / 2).mean()


def plain_cosines(vision: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return (vision @ text.T) / (vision.norm(dim=1)[:, None] * text.norm(dim=1)[None])


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("as_mask", [False, True], ids=["indices", "mask"])
def test_values_and_gradients(beta: float, as_mask: bool) -> None:
    """Teacher rows in the order of the match, and of all its text tokens those that the student's columns are."""
    teacher = torch.tanh(draw(9, 12, seed=1))
    matched, chosen = torch.tensor([7, 0, 3, 8]), torch.tensor([2, 3, 9])
    text = torch.zeros(12, dtype=torch.bool).scatter(0, chosen, True) if as_mask else chosen
    vision, words = draw(4, 6, seed=2).requires_grad_(), draw(3, 6, seed=3).requires_grad_()
    loss = affinity_loss(teacher, cosine_affinity(vision, words), matched, text, beta)
    loss.backward()
    wide = [one.detach().double().requires_grad_() for one in (vision, words)]
    expected = smooth_l1(plain_cosines(*wide) - teacher.double()[matched][:, chosen], beta)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    assert_all_close([one.grad.double() for one in (vision, words)], [one.grad for one in wide], 1e-5)


def test_cosines_do_not_depend_on_length() -> None:
    vision, text = draw(4, 6, seed=2), draw(3, 6, seed=3)
    expected = plain_cosines(vision.double(), text.double())
    for scale in (1e-4, 1.0, 1e4):
        torch.testing.assert_close(cosine_affinity(vision * scale, text).double(), expected, rtol=1e-5, atol=1e-6)
    narrow = cosine_affinity(vision.bfloat16(), text.bfloat16())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), expected, rtol=0, atol=2**-7)


def test_a_student_like_its_teacher_has_no_loss() -> None:
    vision, text = draw(9, 6, seed=2), draw(5, 6, seed=3)
    matched = torch.tensor([4, 2, 0])
    student = cosine_affinity(vision[matched] * 3.0, text)
    assert affinity_loss(cosine_affinity(vision, text), student, matched, torch.arange(5)) < 1e-12


def test_unmatched_rows_are_left_out_of_the_mean() -> None:
    teacher, student = torch.tanh(draw(2, 5, seed=1)), torch.tanh(draw(3, 5, seed=2))
    text, matched = torch.arange(5), torch.tensor([1, UNMATCHED, 0])
    loss = affinity_loss(teacher, student, matched, text)
    torch.testing.assert_close(loss, affinity_loss(teacher, student[[0, 2]], torch.tensor([1, 0]), text))


@pytest.mark.parametrize("case", ["no vision", "no text", "no match"])
def test_nothing_to_compare(case: str) -> None:
    rows, words = (0 if case == "no vision" else 3), (0 if case == "no text" else 4)
    vision, text = draw(rows, 6).requires_grad_(), draw(words, 6).requires_grad_()
    matched = torch.full((rows,), UNMATCHED) if case == "no match" else torch.arange(rows)
    loss = affinity_loss(torch.zeros(rows, 4), cosine_affinity(vision, text), matched, torch.arange(words))
    loss.backward()
    assert loss == 0 and torch.isfinite(vision.grad).all() and torch.isfinite(text.grad).all()
