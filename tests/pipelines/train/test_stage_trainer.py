"""What is refused or settled when a stage's trainer is put together, before its first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.edit.choose_samples import RowFilter
from pipelines.edit.derive import subset
from pipelines.settings import Settings
from pipelines.train.stage_identity import stage_identity
from pipelines.train.stage_plans import plan_stages
from pipelines.train.stage_trainer import load_maps, save_maps
from pipelines.train.train_student import train
from student_train.config import StageSettings, TrainSettings
from student_train.token_ids import check_head
from teacher_cache.errors import CompatibilityError
from teacher_cache.reading.cache import TeacherCache


@pytest.fixture(scope="module")
def text_only(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> Path:
    """The rows of ``tiny_cache`` without a picture."""
    out = tmp_path_factory.mktemp("caches") / "text"
    subset(str(tiny_cache), str(out), ("sft",), None, RowFilter(images=False), 1)
    return out


@pytest.mark.parametrize(
    "method, knobs", [("em-kd", {}), ("epic-tcd", {"layer": 1}), ("align-kd", {"beta": 0.0, "focus": 0.0})]
)
def test_a_part_without_images_is_refused_where_the_method_learns_from_them(
    text_only: Path, tiny_student: Path, tmp_path: Path, method: str, knobs: dict[str, Any], add_attention: Any
) -> None:
    settings = Settings(
        train=TrainSettings(student=str(tiny_student), output_dir=str(tmp_path / "run"), report_to="none")
    )
    cache = add_attention(text_only) if method == "align-kd" else text_only
    with pytest.raises(CompatibilityError, match=r"none of the first \d+ rows of part sft has an image"):
        train(str(cache), method, settings, "DFT", knobs=knobs)
    assert not list((tmp_path / "run").glob("*/metrics.jsonl"))


@pytest.fixture
def add_attention(tiny_teacher: Path, copy_of: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """A copy of a cache with field ``attention``."""

    def add(cache: Path) -> Path:
        from pipelines.edit.fields import add_fields
        from pipelines.settings import CaptureSettings
        from teacher_cache.teachers.transformers import TeacherSpec

        copy = copy_of(cache)
        spec = TeacherSpec(str(tiny_teacher), dtype="float32", device="cpu")
        add_fields(str(copy), spec, {"attention": {}}, CaptureSettings(workers=1))
        return copy

    return add


def test_a_head_that_cannot_say_the_teachers_tokens_is_refused() -> None:
    fields = {"response_hidden": {"teacher": {"head_width": 110, "tokenizer": {"length": 100}}}}

    def student(rows: int) -> Any:
        return SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=rows))

    check_head(student(100), fields, "student")  # padding of the teacher's head is no vocabulary
    with pytest.raises(CompatibilityError, match="head has 99 rows, the teacher of field response_hidden speaks 100"):
        check_head(student(99), fields, "student")


def test_maps_outlive_a_stage_without_them(tmp_path: Path) -> None:
    first, last = nn.ModuleDict({"vision": nn.Linear(3, 2)}), nn.ModuleDict({"vision": nn.Linear(3, 2)})
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_maps(one, first.state_dict(), tmp_path / "nothing")
    save_maps(two, {}, one)
    load_maps(two, last)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), last.parameters()))
    other = nn.ModuleDict({"vision": nn.Linear(4, 2)})
    before = [p.clone() for p in other.parameters()]
    load_maps(two, other)  # of another student: they begin afresh
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters()))


def test_what_is_drawn_for_every_micro_batch_is_part_of_a_stages_identity(tiny_cache: Path, tiny_student: Path) -> None:
    cache = TeacherCache(str(tiny_cache))

    def identity(method: str, size: int, knobs: dict[str, Any] | None = None) -> dict[str, Any]:
        train_settings = TrainSettings(
            student=str(tiny_student), per_device_train_batch_size=size, gradient_accumulation_steps=8 // size
        )
        own = {"DFT": StageSettings(parts=("sft",))}
        (plan,) = plan_stages(cache, method, Settings(train=train_settings, stages=own), "DFT", "paper", knobs)
        return stage_identity(cache, plan, 8, 8, str(tiny_student))

    for method, knobs in (("epic-tcd", {"layer": 1}), ("em-kd", {"columns": 64})):
        assert identity(method, 4, knobs) != identity(method, 2, knobs)
        assert identity(method, 4, knobs)["draws"] == 2, "seeds were Python's hash before"
    for method in ("em-kd", "llava-kd", "sft"):
        assert identity(method, 4) == identity(method, 2)
