"""The subclass of TRL's SFTTrainer in docs/library.md, as it stands there: its first step has the gradients of ``kdcli train-student``."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from student_train.library.dataset import CacheDataset
from student_train.order import InPlace, Order
from tests.kdcli.conftest import Gradients, far, first_gradients, here, train_student  # noqa: F401
from tests.kdcli.test_library_page import CLOSE, example

pytest.importorskip("trl", reason="no trl: run this by `make test-trl`")


def test_the_subclass_of_trl_has_the_gradients_of_train_student(
    here: Path,  # noqa: F811
    first_gradients: list[Any],  # noqa: F811
    train_student: Callable[..., list[Gradients]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TRL shuffles by itself: train-student is given the rows in the order in which the example asked for them."""
    asked: list[int] = []
    read = CacheDataset.__getitem__

    def noted(rows: CacheDataset, number: int) -> Any:
        asked.append(number)
        return read(rows, number)

    monkeypatch.setattr(CacheDataset, "__getitem__", noted)
    left = runpy.run_path(str(example("sft_trainer.py", here)))
    assert 8 <= len(set(asked)) == len(asked) and sorted(asked) != asked
    monkeypatch.setattr(Order, "at", lambda order, position: InPlace(order.counts).at(asked[position % len(asked)]))
    places = {id(one): f"model.{name}" for name, one in left["student"].named_parameters()}
    ours = {places[place]: one for place, one in first_gradients[0]}
    assert (
        far(ours, train_student("--method", "kd", "--per-device-train-batch-size", "4", "--max-steps", "1")[0]) < CLOSE
    )
