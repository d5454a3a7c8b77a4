"""A compressor in a student: refused in one line before weights are read, installed, saved, read back, and seen by its processor."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from student_train.compression import asked_for, compressor_of
from student_train.compressors import CompressorSpec
from student_train.config import TrainSettings
from student_train.load_student import load_student, module_group, open_student, save_student
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Image as Picture
from teacher_cache.records import Sample, Turn

PICTURE = Image.effect_noise((120, 96), 90).convert("RGB")


@pytest.fixture
def without_weights(tiny_student: Path, tmp_path: Path) -> Callable[..., Path]:
    """``without_weights(**changes of config.json)`` → a student folder in which any look at weights fails."""

    def make(**changes: Any) -> Path:
        folder = Path(shutil.copytree(tiny_student, tmp_path / f"student-{len(list(tmp_path.iterdir()))}"))
        (folder / "model.safetensors").unlink()
        config = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            config[name] = {**config[name], **value} if isinstance(value, dict) and name in config else value
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture(scope="module")
def saved(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``saved(name, tokens)`` → a folder of the student with that compressor."""

    def make(name: str, tokens: int | None = None) -> Path:
        torch.manual_seed(4)
        folder = tmp_path_factory.mktemp("compressed") / name
        save_student(*load_student(str(tiny_student), "sdpa", compressor=CompressorSpec(name, tokens)), folder)
        return folder

    return make


def logits_of(model: Any, processor: Any) -> torch.Tensor:
    inputs = processor(text=["<image>what is there?"], images=[PICTURE], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_weights_of_an_earlier_version_are_refused_before_they_are_read(saved: Callable[..., Path]) -> None:
    """mqt of version 1 had no mark, and its weights say something else under today's equations."""
    config = saved("mqt", 8) / "config.json"
    body = json.loads(config.read_text())
    assert body["kdcli_compressor"].pop("version") == 2
    config.write_text(json.dumps(body))
    with pytest.raises(
        CompatibilityError, match=r"compressor mqt is of version 1, this kdcli has 2.*train the student again"
    ):
        load_student(str(config.parent), "sdpa")
    assert "version" not in json.loads((saved("adaptive_pool", 9) / "config.json").read_text())["kdcli_compressor"]


def test_a_saved_student_with_another_count_of_an_elastic_compressor(saved: Callable[..., Path]) -> None:
    folder = saved("mqt", 8)
    model, processor = load_student(str(folder), "sdpa", compressor=CompressorSpec("mqt", 5))
    assert compressor_of(model.config) == CompressorSpec("mqt", 5, largest=36, version=2)
    assert logits_of(model, processor).shape[1] + 3 == logits_of(*load_student(str(folder), "sdpa")).shape[1]
    same, _ = load_student(str(folder), "sdpa", compressor=CompressorSpec("", 5))
    assert compressor_of(same.config) == compressor_of(model.config)


@pytest.mark.parametrize(
    "asked, words",
    [
        (CompressorSpec("tokenpacker", 9), "already has compressor adaptive_pool with 9.*cannot become tokenpacker"),
        (CompressorSpec("adaptive_pool", 4), "already has compressor adaptive_pool with 9.*with 4"),
        (CompressorSpec("", 4), "already has compressor adaptive_pool with 9"),
        (CompressorSpec("mqt", 9), "already has compressor adaptive_pool"),
        (CompressorSpec("mqt", 4, optional=True), "already has compressor adaptive_pool"),
    ],
)
def test_another_compressor_than_the_folder_has_is_refused(
    saved: Callable[..., Path], asked: CompressorSpec, words: str
) -> None:
    folder = saved("adaptive_pool", 9)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CompatibilityError, match=words) as caught:
        load_student(str(folder), "sdpa", compressor=asked)
    assert "\n" not in str(caught.value)
    assert open_student(str(folder), compressor=CompressorSpec("tokenpacker", optional=True))[2] == CompressorSpec(
        "adaptive_pool", 9
    ), "a method's default gives way"


def test_a_tower_whose_patches_leave_some_pixels_out(without_weights: Callable[..., Path]) -> None:
    """SigLIP-so400m: 384 = 27 · 14 + 6, which 144 tokens cannot be made of."""
    folder = without_weights(vision_config={"image_size": 384, "patch_size": 14})
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["patch_size"] = 14
    processor["image_processor"] |= {"crop_size": {"height": 384, "width": 384}, "size": {"shortest_edge": 384}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    assert open_student(str(folder), compressor=CompressorSpec("adaptive_pool", 81))[0].vision_grid == (9, 9)
    with pytest.raises(
        CompatibilityError, match=r"144 vision tokens .* 27×27 grid .*choose --vision-tokens from 81, 9, 1$"
    ):
        open_student(str(folder), compressor=CompressorSpec("adaptive_pool", 144))


REFUSED: dict[str, tuple[CompressorSpec, dict[str, Any], str]] = {
    "unknown": (CompressorSpec("pool"), {}, "unknown compressor 'pool': choose from adaptive_pool, mqt.*or none"),
    "count": (
        CompressorSpec("adaptive_pool", 16),
        {},
        "16 vision tokens.*6×6 grid.*choose --vision-tokens from 9, 4, 1",
    ),
    "all": (CompressorSpec("pixel_shuffle", 36), {}, "36 vision tokens.*choose --vision-tokens from 9, 4, 1"),
    "none left": (CompressorSpec("mqt", 0), {}, "0 vision tokens.*from 1 to 35"),
    "no name": (CompressorSpec("", 9), {}, "has no compressor, which vision_tokens 9 needs"),
    "layers": (CompressorSpec("mqt", 9, layers=(1,)), {}, "leave vision_feature_layers out"),
    "class token": (
        CompressorSpec("adaptive_pool"),
        {"vision_config": {"patch_size": 8}},
        "writes 36 vision tokens an image, its vision tower has 12×12 patches.*--compressor none",
    ),
    "family": (
        CompressorSpec("adaptive_pool"),
        {"model_type": "llava_onevision"},
        "family llava_onevision.*LLaVA-1.5 or LLaVA-NeXT type.*--compressor none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_weights_are_read(without_weights: Callable[..., Path], case: str) -> None:
    asked, changes, words = REFUSED[case]
    with pytest.raises(KdcliError, match=words) as caught:
        load_student(str(without_weights(**changes)), "sdpa", compressor=asked)
    assert "\n" not in str(caught.value)


def test_a_compressed_student_cannot_be_a_teacher(saved: Callable[..., Path]) -> None:
    from teacher_cache.teachers.transformers import (
        TeacherSpec,
        TransformersTeacher,
        load_processor,
        teacher_fingerprint,
    )

    spec = TeacherSpec(str(saved("adaptive_pool", 9)), device="cpu")
    parts = load_processor(spec)
    for run in (teacher_fingerprint, TransformersTeacher):
        with pytest.raises(CompatibilityError, match=r"compressed vision tokens.*not be a teacher"):
            run(spec, *parts)


def test_lost_weights_are_named(saved: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved("mqt", 9)
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if name.endswith("multi_modal_projector.queries"))
    del weights[lost]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(KdcliError, match=r"has compressor mqt, but lacks its weights.*queries"):
        load_student(str(folder), "sdpa")


def test_what_settings_ask_for() -> None:
    assert asked_for(TrainSettings()) is None
    assert asked_for(TrainSettings(compressor="none"), "adaptive_pool") is None
    assert asked_for(TrainSettings(), "adaptive_pool") == CompressorSpec("adaptive_pool", optional=True)
    chosen = TrainSettings(compressor="tokenpacker", vision_tokens=4, vision_feature_layers=(1, 2))
    assert asked_for(chosen, "adaptive_pool") == CompressorSpec("tokenpacker", 4, (1, 2))
    assert asked_for(TrainSettings(vision_tokens=4)) == CompressorSpec("", 4, optional=True)
    with pytest.raises(KdcliError, match="unknown compressor 'pool'"):
        asked_for(TrainSettings(compressor="pool"))
    with pytest.raises(KdcliError, match="does not change the student"):
        asked_for(TrainSettings(compressor="none", vision_tokens=4))


@pytest.mark.parametrize("name, grid", [("adaptive_pool", (3, 3)), ("mqt", (1, 9))])
def test_preparation_sees_the_compressed_grid(tiny_student: Path, name: str, grid: tuple[int, int]) -> None:
    processor, config, _ = open_student(str(tiny_student), compressor=CompressorSpec(name))
    import io

    PICTURE.save(file := io.BytesIO(), "PNG")
    pictures = (Picture("a", file.getvalue()), Picture("b", file.getvalue()))
    row = Sample("sft", 0, "", "row", (Turn("user", "<image>\n<image>\nwhat?"), Turn("assistant", "noise")), pictures)
    prepared = Preparer(processor, config).prepare(row)
    assert [[view.grid for view in image.views] for image in prepared.layout] == [[grid], [grid]]
    assert prepared.layout[0].views[0].crop == (12, 0, 108, 96), "the crop is the stock one"
    assert len(prepared.vision_positions) == 18
    stock, stock_config, _ = open_student(str(tiny_student))
    assert len(Preparer(stock, stock_config).prepare(row)) == len(prepared) + 2 * (36 - 9)


def test_the_processor_is_the_stock_one_but_for_the_count(tiny_student: Path, tmp_path: Path) -> None:
    stock, _, _ = open_student(str(tiny_student))
    own, _, _ = open_student(str(tiny_student), compressor=CompressorSpec("adaptive_pool"))
    assert isinstance(own, type(stock)) and type(own).__name__ == type(stock).__name__
    for folder, one in (("stock", stock), ("own", own)):
        one.save_pretrained(tmp_path / folder)
    for file in (tmp_path / "stock").iterdir():
        assert file.read_bytes() == (tmp_path / "own" / file.name).read_bytes()
    ids = own(text=["<image>hm"], images=[PICTURE], return_tensors="pt")["input_ids"]
    for twin in (pickle.loads(pickle.dumps(own)), copy.deepcopy(own), copy.copy(own)):
        assert twin.vision_grid == (3, 3)
        assert torch.equal(twin(text=["<image>hm"], images=[PICTURE], return_tensors="pt")["input_ids"], ids)
    assert own._get_num_multimodal_tokens([[96, 120]])["num_image_tokens"] == [9]
    assert stock._get_num_multimodal_tokens([[96, 120]])["num_image_tokens"] == [36]


def test_a_fresh_student_depends_on_the_seed_alone(tiny_student: Path) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model, _ = load_student(str(tiny_student), "sdpa", compressor=CompressorSpec("tokenpacker"))
        return {name: p for name, p in model.named_parameters() if module_group(name) == "projector"}

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_layers_that_tokenpacker_reads_are_the_students(tiny_student: Path) -> None:
    """Several layers reach the projector side by side, the student's own feature last."""
    model, processor = load_student(str(tiny_student), "sdpa", compressor=CompressorSpec("tokenpacker"))
    stock, _ = load_student(str(tiny_student), "sdpa")
    seen: list[torch.Tensor] = []
    for one in (model, stock):
        one.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits_of(model, processor), logits_of(stock, open_student(str(tiny_student))[0])
    assert seen[0].shape == (1, 36, 2 * 24) and model.config.vision_feature_layer == [1, 2]
    assert torch.equal(seen[0][..., 24:], seen[1])
