"""Costs of many groups at once against each group's own."""

from __future__ import annotations

import pytest
import torch

from student_train import group_costs
from student_train.distributions import DenseTeacher, HeadAndSketch
from student_train.group_costs import column_sampled_costs, manhattan_costs, packs
from student_train.losses.matching import manhattan_cost
from student_train.match_groups import MatchGroup
from teacher_cache.errors import KdcliError
from teacher_cache.models.head import topk_rows
from teacher_cache.models.low_rank import LowRankHead
from teacher_cache.signal_records import Sketch
from tests.student_train.plain_losses import column_sampled_cost

VOCABULARY, PADDED, WIDTH, TEACHER_WIDTH = 61, 66, 7, 11
SIZES = ((9, 4), (5, 5), (30, 3), (8, 2), (2, 1))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sides() -> tuple[DenseTeacher, torch.Tensor, torch.Tensor, list[MatchGroup]]:
    """(teacher, student hidden, student head with padding rows, groups with a row between any two that belongs to none)"""
    groups, first = [], (0, 0)
    for theirs, ours in SIZES:
        groups.append(MatchGroup(torch.arange(theirs), torch.randperm(ours)).after(*first))
        first = first[0] + theirs + 1, first[1] + ours + 1
    teacher = DenseTeacher(draw(first[0], TEACHER_WIDTH), draw(VOCABULARY, TEACHER_WIDTH, seed=1))
    return teacher, draw(first[1], WIDTH, seed=2), draw(PADDED, WIDTH, seed=3), groups


@pytest.mark.parametrize("room", [1, 8, 14, 1000], ids="rows of a chunk {}".format)
@pytest.mark.parametrize("space", ["logits", "probs"])
def test_exact_costs_are_those_of_each_group(monkeypatch: pytest.MonkeyPatch, room: int, space: str) -> None:
    """However groups fall into packs, a group larger than a chunk included."""
    teacher, hidden, head, groups = sides()
    monkeypatch.setattr(group_costs, "CHUNK_BYTES", 4 * PADDED * room)
    costs = list(manhattan_costs(teacher, hidden.requires_grad_(), head.requires_grad_(), groups, space))
    assert [cost.shape for cost in costs] == [torch.Size(size) for size in SIZES]
    for cost, group in zip(costs, groups):
        expected = manhattan_cost(teacher[group.teacher], hidden[group.student], head, space)
        torch.testing.assert_close(cost, expected, rtol=1e-5, atol=1e-5)
        assert not cost.requires_grad


@pytest.mark.parametrize("room", [1, 14, 1000], ids="rows of a chunk {}".format)
def test_sampled_costs_are_those_of_each_group_from_the_same_draw(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    teacher, hidden, head, groups = sides()
    monkeypatch.setattr(group_costs, "CHUNK_BYTES", 4 * 9 * room)
    costs = list(column_sampled_costs(teacher, hidden, head, groups, 9, torch.Generator().manual_seed(5)))
    for cost, group in zip(costs, groups, strict=True):
        again = torch.Generator().manual_seed(5)
        expected = column_sampled_cost(teacher[group.teacher], hidden[group.student], head, 9, again)
        torch.testing.assert_close(cost, expected, rtol=1e-5, atol=1e-5)


def test_sampled_costs_have_no_bias() -> None:
    """Group by group, over many shared draws."""
    teacher, hidden, head, groups = sides()
    source = torch.Generator().manual_seed(0)
    draws = [list(column_sampled_costs(teacher, hidden, head, groups, 9, source)) for _ in range(1500)]
    for exact, found in zip(manhattan_costs(teacher, hidden, head, groups, "logits"), zip(*draws)):
        every = torch.stack(found)
        error = every.std(dim=0) / len(every) ** 0.5
        assert ((every.mean(dim=0) - exact).abs() < 5 * error).all()


def test_a_teacher_with_a_sketch_and_a_head() -> None:
    teacher, hidden, head, groups = sides()
    low = LowRankHead(draw(VOCABULARY, 3, seed=4), draw(VOCABULARY, seed=5))
    sketch = Sketch(draw(len(teacher), 3, seed=6), draw(len(teacher), seed=7))
    both = HeadAndSketch(topk_rows(teacher.hidden, teacher.head, 4), sketch, low)
    every = column_sampled_costs(both, hidden, head, groups, 10**6, torch.Generator())
    for sampled, exact in zip(every, manhattan_costs(both, hidden, head, groups, "logits"), strict=True):
        torch.testing.assert_close(sampled, exact, rtol=1e-5, atol=1e-5)


def test_only_known_spaces() -> None:
    with pytest.raises(KdcliError, match="logits, probs"):
        list(manhattan_costs(*sides(), "cosine"))


def test_packs_keep_the_order_and_the_room() -> None:
    *_, groups = sides()
    found = list(packs(groups, 14))
    assert [[len(group.teacher) for group in pack] for pack in found] == [[9, 5], [30], [8, 2]]
    assert not list(packs([], 14))
