"""Every example of docs/library.md, as it stands there: it runs, and its first step has the gradients of ``kdcli train-student``."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kdcli.conftest import Gradients, far

PAGE = Path(__file__).parents[2] / "docs" / "library.md"
CLOSE = 2e-5
"""Share of the gradient's norm: float32 sums in another order."""


def example(name: str, folder: Path) -> Path:
    (text,) = re.findall(rf"```python\n(# {name}\n.*?)```", PAGE.read_text(), flags=re.DOTALL)
    file = folder / name
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("name", "method", "batches"),
    [
        ("plain_loop.py", "kd", ("4", "1")),
        ("any_method.py", "llava-kd", ("2", "2")),
        ("hf_trainer.py", "llava-kd", ("2", "2")),
    ],
)
def test_an_example_has_the_gradients_of_train_student(
    name: str,
    method: str,
    batches: tuple[str, str],
    here: Path,
    first_gradients: list[Any],
    train_student: Callable[..., list[Gradients]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "hf_trainer.py":
        pytest.importorskip("accelerate")
    left = runpy.run_path(str(example(name, here)))
    assert "loss" in capsys.readouterr().out
    places = {id(one): f"model.{name}" for name, one in left["student"].named_parameters()}
    ours = {places[place]: one for place, one in first_gradients[0]}
    size, count = batches
    sizes = ("--per-device-train-batch-size", size, "--gradient-accumulation-steps", count)
    assert far(ours, train_student("--method", method, *sizes)[0]) < CLOSE


def test_the_five_lines_print_a_distribution_and_the_answer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = runpy.run_path(str(example("one_sample.py", here)))
    said = left["teacher"].log_probs("response")
    assert torch.allclose(said.exp().sum(1), torch.ones(len(said)), atol=1e-4)
    assert str(tuple(said.shape))[1:-1] in capsys.readouterr().out
