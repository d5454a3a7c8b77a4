"""The composed teacher: exact head, exact tail mass, the sketch's shape of the tail."""

from __future__ import annotations

import pytest
import torch

from student_train.distributions import DenseTeacher, HeadAndSketch, SketchTeacher
from student_train.losses.divergences import forward_kl, reverse_kl
from teacher_cache.models.head import topk_rows
from teacher_cache.models.low_rank import LowRankHead
from teacher_cache.signal_records import Sketch
from tests.close import assert_close

V, D, ROWS = 400, 16, 12


def composed(k: int = 8, scale: float = 1.0, step: float = 0.05, seed: int = 0) -> tuple[HeadAndSketch, torch.Tensor]:
    """(the teacher, its exact logits float64): hidden states rounded to ``step``, everything else as the teacher says it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=generator)
    hidden = torch.randn(ROWS, D, generator=generator) * scale
    centre = weight.mean(dim=0)
    head = LowRankHead(weight - centre, torch.zeros(V))
    sketch = Sketch((hidden / step).round() * step, hidden @ centre)
    return HeadAndSketch(topk_rows(hidden, weight, k), sketch, head), hidden.double() @ weight.double().T


@pytest.mark.parametrize("k", [1, 8, V])
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_a_distribution_with_an_exact_head_and_tail(k: int, scale: float) -> None:
    teacher, logits = composed(k, scale)
    log_p = teacher.log_probs()
    exact = logits.log_softmax(dim=1)
    torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(ROWS), atol=1e-5, rtol=0)
    ids = teacher.topk.ids
    tolerance = {"atol": 1e-4 * max(1.0, scale), "rtol": 1e-5}
    torch.testing.assert_close(log_p.gather(1, ids).double(), exact.gather(1, ids), **tolerance)
    tail = log_p.scatter(1, ids, -torch.inf).logsumexp(dim=1)
    expected = exact.scatter(1, ids, -torch.inf).logsumexp(dim=1)
    torch.testing.assert_close(tail.double(), expected, **tolerance)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_temperature_is_applied_after_the_composition(temperature: float) -> None:
    teacher, logits = composed(8, 1.0, step=0.02)
    log_p = teacher.log_probs(temperature)
    torch.testing.assert_close(log_p, (teacher.log_probs() / temperature).log_softmax(dim=1), atol=1e-5, rtol=0)
    exact = (logits / temperature).log_softmax(dim=1)
    divergence = (exact.exp() * (exact - log_p)).sum(dim=1)
    assert float(divergence.max()) < 2e-4, "the tail's mass is approximate, not wrong"


def test_raw_logits_keep_the_head() -> None:
    teacher, logits = composed(8)
    ids = teacher.topk.ids
    torch.testing.assert_close(teacher.logits().gather(1, ids).double(), logits.gather(1, ids), atol=1e-4, rtol=0)
    error = (teacher.logits() - logits).square().mean().sqrt()
    assert float(error) <= 0.05 * (D / 12) ** 0.5 * 1.1


def test_the_head_heals_what_a_coarse_sketch_loses() -> None:
    """At Δ = 0.2 the composed teacher is several times nearer than the sketch alone."""
    teacher, logits = composed(8, 3.0, step=0.2)
    exact = logits.log_softmax(dim=1)
    alone = teacher.head.logits(teacher.sketch).double().log_softmax(dim=1)

    def divergence(log_p: torch.Tensor) -> float:
        return float((exact.exp() * (exact - log_p)).sum(dim=1).mean())

    assert 0 <= divergence(teacher.log_probs().double()) < 0.3 * divergence(alone)


@pytest.mark.parametrize(("k", "scale"), [(V, 1.0), (8, 200.0), (1, 200.0)])
def test_empty_and_nearly_empty_tails_give_no_nan(k: int, scale: float) -> None:
    """K = V, and log_tail near −1,000: the loss and its gradient stay numbers."""
    teacher, _ = composed(k, scale)
    student = torch.randn(ROWS, V, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = forward_kl(teacher, student) + reverse_kl(teacher, student)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(student.grad).all()


def test_rows_are_cut_together() -> None:
    teacher, _ = composed(8)
    chosen = torch.tensor([3, 0, 7])
    assert_close(teacher[chosen].log_probs(), teacher.log_probs()[chosen], 2e-6)
    assert len(teacher[2:5]) == 3 and len(teacher[0:0].log_probs()) == 0


@pytest.mark.parametrize("columns", [[3], [0, 5, 2, 40], list(range(0, 60, 7))], ids=str)
def test_logits_of_some_columns(columns: list[int]) -> None:
    """Of every teacher with a full vocabulary: as if all were made, ids of the head inside and outside of them."""
    teacher, _ = composed()
    chosen = torch.tensor(columns)
    for one in (
        teacher,
        SketchTeacher(teacher.sketch, teacher.head),
        DenseTeacher(torch.randn(9, 5), torch.randn(61, 5)),
    ):
        assert one.vocabulary == one.logits().shape[1]
        torch.testing.assert_close(one.logits_at(chosen), one.logits()[:, chosen], rtol=1e-5, atol=1e-5)
