"""Grids of tiny students over the tiny cache: 16 rows a step, one or two steps a stage."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.ablate import cell, runner
from tests.warm import Child, Warm

BASE = """
cache = "{cache}"

[train]
student = "{student}"
per_device_train_batch_size = 4
max_steps = 1
learning_rate = 1e-3

[[eval]]
name = "heldout"
path = "{heldout}"
image_root = "{images}"
limit = 4
batch_size = 4
"""

VARIED = """
[grid]
seed = [0, 1]

[[variants]]
name = "sft"
method = "sft"
stages = "PT,SFT"

[[variants]]
name = "llava-kd"
method = "llava-kd"
stages = "PT,DFT"
"""


@pytest.fixture
def write_grid(tmp_path: Path, tiny_cache: Path, tiny_student: Path, world: Any) -> Callable[..., Path]:
    """``write_grid(varied=…, top=…, more=…)`` → a grid file: ``top`` lines, the base, what varies, ``more`` of it."""

    def write(varied: str = VARIED, top: str = "", more: str = "") -> Path:
        places = {"cache": tiny_cache, "student": tiny_student, "heldout": world.heldout, "images": world.images}
        path = tmp_path / "grid.toml"
        path.write_text(top + BASE.format(**places) + varied + more)
        return path

    return write


@pytest.fixture
def forked_cells(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Students in processes that import nothing; those that start a program stand in ``test_an_interrupt_ends_the_children…``."""
    fork_cells(warm, monkeypatch)


def fork_cells(warm: Warm, patch: pytest.MonkeyPatch) -> None:
    def start(command: list[str], stdout: Any, env: dict[str, str], **_: Any) -> Child:
        own = {"CUDA_VISIBLE_DEVICES": env["CUDA_VISIBLE_DEVICES"]}
        return warm.start(cell.main, command[-1:], folder=Path.cwd(), errors=Path(stdout.name), log=True, **own)

    patch.setattr(runner, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": start}))
