"""``losses.StepLoss``: a method of one's own, and a step that is cut into other batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kdcli
from kdcli.losses import RowTerm, StepLoss, forward_kl
from student_train.needs import Need
from tests.kdcli.conftest import far, gradients_of


class Mine:
    """A method as somebody writes it in a notebook."""

    def needs(self) -> frozenset[Need]:
        return frozenset({Need("vision_logits")})

    def terms(self) -> dict[str, Any]:
        return {"vision": RowTerm(2.0, "vision", lambda rows: forward_kl(rows.need_teacher(), rows.logits))}


def test_a_method_of_ones_own(tiny_cache: Path, processor: Any, student: Any) -> None:
    cache = kdcli.open_cache(str(tiny_cache))
    method: kdcli.Method = Mine()
    rows = cache.dataset(["sft"], method=method, processor=processor, config=student.config)
    batch = kdcli.Collator(rows)([rows[0], rows[1]])
    (loss,) = StepLoss(student, rows)([batch])
    teacher = batch.pop("teacher")
    logits = student(**batch).logits.flatten(0, 1)[teacher.positions("vision")]
    assert loss.item() == pytest.approx(2 * forward_kl(teacher.distribution("vision"), logits).mean().item(), rel=1e-5)


@pytest.mark.parametrize("method", ["llava-kd", "kd"])
def test_a_step_has_one_gradient_whatever_it_is_cut_into(
    method: str, tiny_cache: Path, processor: Any, student: Any
) -> None:
    rows = kdcli.open_cache(str(tiny_cache)).dataset(method=method, processor=processor, config=student.config)
    collate, found = kdcli.Collator(rows), []
    for cut in ([range(9)], [range(1), range(1, 3), range(3, 9)]):
        student.zero_grad()
        total = 0.0
        for loss in StepLoss(student, rows)([collate([rows[number + 6] for number in part]) for part in cut]):
            loss.backward()
            total += loss.item()
        found.append((total, gradients_of(student)))
    (whole, ours), (cut_up, theirs) = found
    assert whole == pytest.approx(cut_up, rel=1e-5) and far(ours, theirs) < 2e-5
    assert all(torch.isfinite(one).all() for one in ours.values())
