"""Packed samples of every family: the states and gradients that a row each gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.config import TrainSettings
from student_train.division import balanced
from student_train.load_student import load_student
from student_train.methods import create_method
from student_train.packed_samples import packing_of
from student_train.packing import places_of
from student_train.student import RowForward
from teacher_cache.errors import CompatibilityError
from teacher_cache.preparing.batch import Batch, collate
from teacher_cache.preparing.prepare import Preparer
from tests.close import assert_all_close, assert_close
from tests.families.models import FAMILIES
from tests.families.rows import read_rows

REFUSED = ("gemma-3",)
"""Its image tokens are not causal, and their mask does not keep samples of one row apart."""


EXACT = {"sdpa": 1e-9, "eager": 5e-6}
"""Relative. transformers' eager attention takes its softmax in float32, whatever the model is in."""


def told(student: RowForward, batch: Batch) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """(sample → kind → its states, gradients of the sum of their squares)"""
    found = student(batch, ("vision", "response"))
    states = {kind: dict(zip(batch.keys, found[kind].split(list(batch.counts[kind])))) for kind in found}
    sum(one.square().sum() for one in found.values()).backward()
    gradients = {name: one.grad for name, one in student.named_parameters() if one.grad is not None}
    student.zero_grad()
    return {key: {kind: states[kind][key] for kind in states} for key in batch.keys}, gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_packed_samples_are_as_alone(name: str, attention: str, folder_of: Any, rows_folder: Path) -> None:
    model, processor = load_student(str(folder_of(name)), attention)
    model.double().eval()
    preparer = Preparer(processor, model.config)
    prepared = [preparer.prepare(row) for row in read_rows(rows_folder)]
    lengths = [len(one) for one in prepared]
    assert len(set(lengths)) > 2, "samples of several lengths"
    student = RowForward(model)
    student._head_checked = True
    order, places = places_of(balanced(lengths, 2), lengths)
    packed = collate([prepared[i] for i in order], 0, places)
    assert packed.inputs["input_ids"].shape[0] == 2
    batches = [collate(prepared, 0), packed]
    for one in batches:
        one.inputs.update({n: t.double() for n, t in one.inputs.items() if t.is_floating_point()})
    (alone, dense), (together, gradients) = (told(student, one) for one in batches)
    for key, states in alone.items():
        for kind, rows in states.items():
            assert_close(together[key][kind], rows, EXACT[attention], what=f"{key} {kind}")
    assert gradients.keys() == dense.keys()
    assert_all_close([gradients[name] for name in dense], list(dense.values()), EXACT[attention])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_that_does_not_keep_samples_apart_is_refused(name: str, folder_of: Any) -> None:
    model, _ = load_student(str(folder_of(name)), "sdpa")
    student, method = RowForward(model), create_method("kd")
    if name not in REFUSED:
        assert packing_of(student, method, TrainSettings()).even > 0
        return
    with pytest.raises(CompatibilityError, match="family gemma3 is not known to keep images of packed samples apart"):
        packing_of(student, method, TrainSettings())
