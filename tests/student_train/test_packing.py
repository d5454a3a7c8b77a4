"""Several samples in one row: how they are laid out, and that a step is the one of a row each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from student_train.config import TrainSettings
from student_train.division import balanced
from student_train.methods import create_method
from student_train.packed_samples import packing_of
from student_train.packing import Packing, packed_rows, places_of
from teacher_cache.errors import CompatibilityError
from teacher_cache.families.family import Family
from tests.close import assert_all_close

LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=40)


def longest(rows: list[list[int]], lengths: list[int]) -> int:
    return max(sum(lengths[i] for i in row) for row in rows)


@given(LENGTHS, st.booleans(), st.floats(10, 1e6))
def test_every_sample_lies_in_one_row_and_no_other_layout_is_cheaper(
    lengths: list[int], one_row: bool, even: float
) -> None:
    packing = Packing(one_row, even)
    rows = packed_rows(lengths, packing)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert len(rows) == 1 or not one_row
    size = longest(rows, lengths)
    if not one_row:
        others = [balanced(lengths, count) for count in range(1, len(lengths) + 1)]
        assert packing.cost(len(rows), size) == min(packing.cost(len(one), longest(one, lengths)) for one in others)
        assert packing.cost(len(rows), size) <= packing.cost(len(lengths), max(lengths)), "never dearer than a row each"
    order, places = places_of(rows, lengths)
    starts = [place.row * size + place.offset for place in places]
    ends = [start + lengths[i] for start, i in zip(starts, order)]
    assert starts[0] == 0 and all(end <= start for end, start in zip(ends, starts[1:])), "in order, none over another"
    assert max(place.row for place in places) == len(rows) - 1


def test_lengths_that_differ_tenfold_leave_little_padding() -> None:
    """Images of 576 tokens with short answers beside long conversations, as LLaVA's mixtures have them."""
    drawn = torch.Generator().manual_seed(0)
    packing = Packing(even=6 * 896)  # of a decoder as wide as Qwen2's with 0.5B
    real = places = plain = packed_cost = plain_cost = 0.0
    for _ in range(50):
        text = torch.rand(16, generator=drawn) < 0.06
        lengths = (576 + 150 * torch.exp(0.8 * torch.randn(16, generator=drawn))).clamp(max=2048).int()
        lengths = torch.where(
            text, (735 * torch.exp(0.8 * torch.randn(16, generator=drawn))).clamp(50, 2048).int(), lengths
        )
        rows = packed_rows(lengths.tolist(), packing)
        real += int(lengths.sum())
        places += len(rows) * longest(rows, lengths.tolist())
        plain += 16 * int(lengths.max())
        packed_cost += packing.cost(len(rows), longest(rows, lengths.tolist()))
        plain_cost += packing.cost(16, int(lengths.max()))
    assert real / places > 0.9 and real / plain < 0.6
    assert packed_cost / plain_cost < 0.65


@given(LENGTHS, st.floats(10, 1e6))
def test_attention_that_keeps_its_scores_keeps_no_more_of_them(lengths: list[int], even: float) -> None:
    rows = packed_rows(lengths, Packing(even=even, keeps_scores=True))
    assert len(rows) * longest(rows, lengths) ** 2 <= len(lengths) * max(lengths) ** 2


@pytest.mark.parametrize("method", ["llava-kd", "em-kd", "kd", "sft"])
def test_a_step_is_the_step_of_a_row_each(method: str, tiny_cache: Path, open_stage: Any) -> None:
    found = []
    for packing in (False, True):
        trainer, batches_from = open_stage(tiny_cache, method=method, packing=packing, per_device_train_batch_size=8)
        step, batches = next(batches_from(0))
        rows = trainer.rows_of(step, batches)
        loss, shares = trainer.accumulate(step, batches, trainer.terms_at(step), rows)
        found.append((batches, loss, shares, [one.grad for one in trainer.parameters if one.grad is not None]))
    (plain, loss, shares, gradients), (packed, loss_p, shares_p, gradients_p) = found
    shapes = [one[0].batch.inputs["input_ids"].shape for one in (plain, packed)]
    assert shapes[1][0] < shapes[0][0] == 8 and shapes[1].numel() <= shapes[0].numel()
    assert sorted(plain[0].batch.keys) == sorted(packed[0].batch.keys)
    assert loss_p == pytest.approx(loss, rel=1e-5)
    assert shares_p == pytest.approx(shares, rel=1e-5)
    assert_all_close(gradients_p, gradients, 2e-5)


def test_what_needs_a_row_each_is_refused(tiny_cache: Path, open_stage: Any, monkeypatch: Any) -> None:
    with pytest.raises(CompatibilityError, match=r"removes tokens.*leave out --packing"):
        open_stage(tiny_cache, method="epic-tcd", packing=True)
    trainer, _ = open_stage(tiny_cache, method="sft", packing=True)
    with pytest.raises(CompatibilityError, match=r"first layer.*leave out --packing"):
        packing_of(trainer.model, create_method("align-kd"), TrainSettings())
    config = trainer.model.model.config.get_text_config()
    monkeypatch.setattr(config, "_attn_implementation", "own_attention")
    with pytest.raises(CompatibilityError, match=r"attention own_attention does not keep packed samples apart.*sdpa"):
        packing_of(trainer.model, trainer.method, TrainSettings())


def test_a_student_that_ignores_positions_is_refused(tiny_cache: Path, open_stage: Any, monkeypatch: Any) -> None:
    trainer, _ = open_stage(tiny_cache, method="sft")
    monkeypatch.setattr(Family, "packed_positions", lambda self, model, batch: torch.arange(16)[None])
    with pytest.raises(CompatibilityError, match="does not keep packed samples apart"):
        packing_of(trainer.model, trainer.method, TrainSettings())
