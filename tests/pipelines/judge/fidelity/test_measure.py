"""The numbers themselves: angles, ratios, divergences, which rows are drawn."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from pipelines.judge.fidelity import measure
from pipelines.judge.fidelity.measure import (
    Comparison,
    angles,
    full_log_probs,
    norm_ratios,
    relative_error,
    spread,
    whole_angle,
)
from pipelines.judge.fidelity.rows import draw
from pipelines.judge.fidelity.terms import pool
from student_train.distributions import DenseTeacher, HeadAndTail
from teacher_cache.models.head import topk_rows
from teacher_cache.records import ImageLayout, View


def rotated(degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), 0.0]])


@pytest.mark.parametrize("degrees", [0.0, 0.01, 0.5, 45.0, 90.0, 179.0])
def test_angles_are_right_also_where_they_are_tiny(degrees: float) -> None:
    found = angles(rotated(0.0), 7.0 * rotated(degrees))
    assert float(found) == pytest.approx(degrees, rel=2e-4, abs=1e-5)
    assert whole_angle([rotated(0.0)], [7.0 * rotated(degrees)]) == pytest.approx((degrees, 7.0), rel=2e-4, abs=1e-5)


def test_rows_without_gradient_have_no_direction() -> None:
    zero, some = torch.zeros(1, 3), torch.ones(1, 3)
    assert math.isnan(angles(zero, zero)) and float(angles(some, zero)) == pytest.approx(90.0)
    assert math.isnan(norm_ratios(zero, some)) and float(norm_ratios(some, 2 * some)) == pytest.approx(2.0)
    assert spread([angles(zero, zero), torch.tensor([1.0, 3.0])])["median"] == 2.0
    assert math.isnan(spread([])["median"])


def test_a_gradient_of_many_tensors_is_one_vector() -> None:
    left, right = [torch.tensor([1.0]), torch.tensor([0.0, 0.0])], [torch.tensor([1.0]), torch.tensor([0.0, 1.0])]
    assert whole_angle(left, right) == pytest.approx((45.0, math.sqrt(2)))


def test_relative_error_of_nothing() -> None:
    assert relative_error(0.0, 0.0) == 0.0 and math.isinf(relative_error(1.0, 0.0))
    assert relative_error(0.9, 1.0) == pytest.approx(-0.1)


@pytest.fixture(scope="module")
def teacher() -> DenseTeacher:
    torch.manual_seed(0)
    return DenseTeacher(2 * torch.randn(40, 8), torch.randn(50, 8))


def test_a_tail_is_spread_over_its_tokens(teacher: DenseTeacher) -> None:
    whole = full_log_probs(HeadAndTail(topk_rows(teacher.hidden, teacher.head, 5), 50))
    assert whole is not None
    assert torch.allclose(whole.exp().sum(1), torch.ones(40), atol=1e-5)
    best = teacher.log_probs().argmax(1, keepdim=True)
    assert torch.allclose(whole.gather(1, best), teacher.log_probs().gather(1, best), atol=1e-5)


def test_the_error_grows_with_the_damage(teacher: DenseTeacher) -> None:
    torch.manual_seed(1)
    student, head = torch.randn(40, 6), torch.randn(60, 6)  # columns beyond the teacher's are padding
    seen = []
    for noise in (0.0, 0.01, 0.1, 1.0):
        other = DenseTeacher(teacher.hidden + noise * torch.randn_like(teacher.hidden), teacher.head)
        comparison = Comparison([""])
        comparison.add(teacher, {"": other}, student @ head.T, student)
        seen.append(comparison.summary()[""])
    first = seen[0]
    assert first["kl"]["mean"] == pytest.approx(0, abs=1e-6) and first["forward"]["head_angle"] == pytest.approx(
        0, abs=1e-3
    )

    def rising(pick: Any) -> bool:
        values = [pick(one) for one in seen]
        return all(a < b for a, b in itertools.pairwise(values))

    assert rising(lambda one: one["kl"]["mean"])
    for direction in ("forward", "reverse"):
        assert rising(lambda one, d=direction: one[d]["head_angle"]) and rising(
            lambda one, d=direction: one[d]["row_angle"]["median"]
        )
    assert seen[-1]["forward"]["row_angle"]["median"] > 10


def test_chunks_are_the_whole(teacher: DenseTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several stored ones in chunks of 7 rows, against every gradient written out over all rows at once."""
    torch.manual_seed(2)
    hidden, head = torch.randn(40, 6), torch.randn(50, 6)
    stored = {noise: DenseTeacher(teacher.hidden + noise * torch.randn(40, 8), teacher.head) for noise in (0.1, 1.0)}
    monkeypatch.setattr(measure, "WIDE_VOCABULARY", 1)
    monkeypatch.setattr(measure, "WIDE_CHUNK_BYTES", 7 * 4 * 50)
    found = measure.Comparison(stored)
    chunks = list(measure.row_chunks(40, head))
    assert [len(range(40)[rows]) for rows in chunks] == [7, 7, 7, 7, 7, 5]
    for rows in chunks:
        found.add(teacher[rows], {name: one[rows] for name, one in stored.items()}, hidden[rows] @ head.T, hidden[rows])
    log_p, log_s = teacher.log_probs(), torch.log_softmax(hidden @ head.T, dim=1)

    def gradients(log_t: torch.Tensor) -> dict[str, torch.Tensor]:
        ratio = log_s - log_t
        value = (log_s.exp() * ratio).sum(dim=1, keepdim=True)
        return {"forward": log_s.exp() - log_t.exp(), "reverse": log_s.exp() * (ratio - value)}

    for name, one in found.summary().items():
        log_q = stored[name].log_probs()
        assert one["kl"]["mean"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(1).mean()), rel=1e-4)
        for direction, live in gradients(log_p).items():
            other = gradients(log_q)[direction]
            angle, ratio = whole_angle([live.T @ hidden], [other.T @ hidden])
            assert (one[direction]["head_angle"], one[direction]["head_norm_ratio"]) == pytest.approx(
                (angle, ratio), rel=1e-3
            )
            assert one[direction]["row_angle"]["median"] == pytest.approx(
                spread([angles(live, other)])["median"], rel=1e-3
            )


def test_the_draw_is_even_and_its_beginning_is_a_draw() -> None:
    counts = [5, 1, 9, 4]
    whole = draw(counts, 100, seed=3)
    assert len(whole) == sum(counts) == len(set(whole))
    assert all(row < counts[shard] for shard, row in whole)
    assert {shard for shard, _ in whole[:4]} == {0, 1, 2, 3}
    assert draw(counts, 7, seed=3) == whole[:7] != draw(counts, 7, seed=4)


def test_pooling_averages_squares_of_the_grid_and_leaves_newlines_out() -> None:
    view = View((0, 0, 8, 8), (2, 4), newline=True)
    rows = torch.arange(10.0)[:, None]  # 0 1 2 3 | newline 4 | 5 6 7 8 | newline 9
    pooled = pool(torch.cat([rows, rows + 100]), (ImageLayout((8, 8), (view, view)),))
    assert pooled.flatten().tolist() == [3.0, 5.0, 103.0, 105.0]
    assert pool(rows[:0], ()).shape == (0, 1)
