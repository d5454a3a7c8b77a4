"""The tiny cache and student as a user's folder, and the gradients that ``kdcli train-student`` has there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.student_train.conftest import open_stage  # noqa: F401

Gradients = dict[str, torch.Tensor]


@pytest.fixture
def here(tmp_path: Path, tiny_cache: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: ``my-cache``, ``student``."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "my-cache").symlink_to(tiny_cache)
    (folder / "student").symlink_to(tiny_student)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def student(tiny_student: Path) -> Any:
    return as_in_stage_dft(tiny_student)


def as_in_stage_dft(folder: Path) -> Any:
    """All but the vision tower trains."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()
    model.model.vision_tower.requires_grad_(False)
    return model


@pytest.fixture
def processor(tiny_student: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_student)


@pytest.fixture
def train_student(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Gradients]]:
    """``train_student("--method", "kd", …)`` runs that command, of one stage, in the working folder: the gradients of each of its
    steps as the optimizer got them (clipped to norm 1), by the names of the student with its maps.

    Further words come last, and flags may be given again: ``--cache``, ``--student``, ``--stages``. Weights stay as they are.
    """
    from click.testing import CliRunner

    from cli import main
    from student_train.trainer import Trainer

    def run(*words: str) -> list[Gradients]:
        steps: list[Gradients] = []
        update = Trainer._update

        def seen(trainer: Trainer, step: int) -> float:
            steps.append(gradients_of(trainer.model))
            return update(trainer, step)

        told = "--student student --cache my-cache --stages DFT --output-dir run --max-steps 3 --report-to none --learning-rate 1e-30"
        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "_update", seen)
            done = CliRunner().invoke(main, ["train-student", *told.split(), *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return steps

    return run


@pytest.fixture
def first_gradients() -> Any:
    """Of the first step of any optimizer, by the order of its parameters: of the student's, which come first."""
    found: list[list[torch.Tensor]] = []

    def keep(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        if not found:
            every = [one for group in optimizer.param_groups for one in group["params"]]
            found.append([(id(one), one.grad.clone()) for one in every if one.grad is not None])  # type: ignore[misc]

    handle = register_optimizer_step_pre_hook(keep)
    yield found
    handle.remove()


def gradients_of(model: torch.nn.Module) -> Gradients:
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def far(ours: Gradients, theirs: Gradients) -> float:
    """Largest distance of two gradients of a parameter, as a share of the whole gradient's norm."""
    assert ours.keys() == theirs.keys() and theirs
    norm = torch.stack([one.square().sum() for one in theirs.values()]).sum().sqrt()
    return max(float((ours[name] - theirs[name]).norm() / norm) for name in theirs)
