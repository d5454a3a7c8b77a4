"""The benchmarks on tiny models: what is tested is that they run and report, never how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import real_shapes


@pytest.fixture(scope="session")
def tiny_models(tiny_teacher: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder as ``--models`` wants it."""
    folder = tmp_path_factory.mktemp("benchmark_models")
    (folder / "teacher").symlink_to(tiny_teacher)
    (folder / "student_start").symlink_to(tiny_student)
    return str(folder)


@pytest.fixture
def small_real_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real-shapes path with every width cut down; grid, padding of the vocabulary and untied head stay."""
    monkeypatch.setattr(real_shapes, "VOCABULARY", 5000)
    monkeypatch.setattr(real_shapes, "IMAGE_SIZE", 56)
    monkeypatch.setattr(real_shapes, "TEXT_TOKENS", 20)
    narrow: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 5064}
    sizes = {name: one | narrow | heads for name, one in real_shapes.QWEN2.items()}
    monkeypatch.setattr(real_shapes, "QWEN2", sizes)
    monkeypatch.setattr(
        real_shapes, "SIGLIP", real_shapes.SIGLIP | narrow | {"num_attention_heads": 2, "image_size": 56}
    )
