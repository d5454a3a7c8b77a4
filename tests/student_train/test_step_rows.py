"""How the rows of a step count: what is selected beside what there is, and nothing counted twice where nothing is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from student_train import step_rows
from student_train.distributed import Processes
from student_train.losses.counted import TermWeights, count_rows
from student_train.losses.terms import RowTerm, label_loss

TERMS = {"reg": RowTerm(1.0, "response", label_loss), "vis": RowTerm(1.0, "vision", label_loss)}
COUNTS = {"response": (2, 1), "vision": (4, 4)}
BATCHES: Any = [SimpleNamespace(filler=False), SimpleNamespace(filler=True)]
ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The terms of every count."""
    seen: list[list[str]] = []

    def counting(counts: Any, terms: Any, *weights: Any) -> dict[str, float]:
        seen.append(list(terms))
        return count_rows(counts, terms, *weights)

    monkeypatch.setattr(step_rows, "count_rows", counting)
    return seen


def test_rows_are_counted_once_where_nothing_is_selected(counted: list[list[str]]) -> None:
    found = step_rows.count_step(BATCHES, TERMS, lambda one: {}, lambda one: COUNTS, ALONE)
    assert found.denominators == {"reg": 3.0, "vis": 8.0} and found.kept == {}
    assert counted == [["reg", "vis"]], "one micro-batch, and no filler"


def test_of_a_term_that_selects_the_share_is_told(counted: list[list[str]]) -> None:
    weights = TermWeights(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.5, 0.5]))
    found = step_rows.count_step(BATCHES, TERMS, lambda one: {"reg": weights}, lambda one: COUNTS, ALONE)
    assert found.denominators == {"reg": 1.5, "vis": 8.0} and found.kept == {"reg": 0.5}
    assert counted == [["reg", "vis"], ["reg"]]
