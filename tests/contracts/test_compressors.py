"""What every compressor promises, run over each file of the folder, in a real tiny student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from cli import main
from pipelines.settings import write_template
from student_train.compression import compressor_of, with_grid
from student_train.compressors import CompressorSpec, compressor_modules
from student_train.load_student import freeze_except, load_student, module_group, open_student, save_student
from teacher_cache.errors import CompatibilityError
from tests.close import assert_close

each_compressor = pytest.mark.parametrize("name", sorted(compressor_modules()))
PICTURES = [Image.effect_noise((96, 96), 40 * number).convert("RGB") for number in (1, 2)]


def compressed(student: Path, name: str, tokens: int | None = None, seed: int = 7) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model, processor = load_student(str(student), "sdpa", compressor=CompressorSpec(name, tokens))
    return model.eval(), processor


def inputs_of(processor: Any) -> Any:
    return processor(text=["<image>one", "<image>another one"], images=PICTURES, return_tensors="pt", padding=True)


@each_compressor
def test_a_compressor_describes_itself(name: str, tmp_path: Path) -> None:
    module = compressor_modules()[name]
    assert name == module.NAME and "arXiv" in module.PAPER
    assert isinstance(module.ELASTIC, bool) and isinstance(module.CHOOSES_LAYERS, bool)
    for told in (CliRunner().invoke(main, ["train-student", "--help"]).output, write_template(tmp_path).read_text()):
        assert name in told, "named by the help of --compressor and by the kd.toml that `kdcli init` writes"


@each_compressor
@pytest.mark.parametrize("tokens", [None, 4, 1])
def test_counts_agree_on_every_side(tiny_student: Path, name: str, tokens: int | None) -> None:
    model, processor = compressed(tiny_student, name, tokens)
    spec, module = compressor_of(model.config), compressor_modules()[name]
    assert spec is not None and spec.count == (tokens or 9), "a quarter by default"
    rows, columns = module.grid(spec)
    assert (
        rows * columns
        == spec.count
        == model.model.get_image_features(inputs_of(processor)["pixel_values"]).pooler_output[0].shape[0]
    )
    largest = module.training_grid(spec)
    assert largest[0] * largest[1] >= spec.count and (module.ELASTIC or largest == (rows, columns))
    ids = inputs_of(with_grid(processor, spec, training=True))["input_ids"]
    assert int((ids == model.config.image_token_id).sum()) == 2 * largest[0] * largest[1]
    assert model(**inputs_of(processor)).logits.isfinite().all()


@each_compressor
def test_saved_and_read_back_bit_by_bit(tiny_student: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoProcessor

    model, processor = compressed(tiny_student, name)
    save_student(model, processor, tmp_path / "student")
    again, own = load_student(str(tmp_path / "student"), "sdpa")
    assert compressor_of(again.config) == compressor_of(model.config)
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs_of(own)).logits, model(**inputs_of(processor)).logits)
    save_student(again, own, tmp_path / "copy")
    for file in ("config.json", "model.safetensors", "processor_config.json"):
        assert (tmp_path / "student" / file).read_bytes() == (tmp_path / "copy" / file).read_bytes(), file
    assert type(AutoProcessor.from_pretrained(tmp_path / "student")).__name__ == "LlavaProcessor"
    assert again.config.architectures == ["LlavaForConditionalGeneration"]
    same, _ = load_student(str(tmp_path / "student"), "sdpa", compressor=compressor_of(model.config))
    assert compressor_of(same.config) == compressor_of(model.config)


@each_compressor
def test_it_trains_as_the_projector(tiny_student: Path, name: str) -> None:
    model, processor = compressed(tiny_student, name)
    trained = freeze_except(model, ("projector",))
    inside = {f"model.multi_modal_projector.{one}" for one, _ in model.model.multi_modal_projector.named_parameters()}
    assert {one for one, _ in trained} == inside and all(module_group(one) == "projector" for one in inside)
    model(**inputs_of(processor)).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in trained)
    silent = [one for one, p in trained if p.grad is not None and not p.grad.any()]
    assert not silent, "every weight learns something"


@each_compressor
def test_half_precision_stays_close(tiny_student: Path, name: str) -> None:
    model, processor = compressed(tiny_student, name)
    inputs = inputs_of(processor)
    with torch.no_grad():
        exact = torch.stack(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = torch.stack(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
    assert (rough.float() - exact).abs().max() <= 0.05 * exact.abs().max()


@each_compressor
def test_it_sees_the_picture_and_only_its_own(tiny_student: Path, name: str) -> None:
    """Tokens of an image depend on that image alone, whatever else is in the batch."""
    model, processor = compressed(tiny_student, name)
    pixels = inputs_of(processor)["pixel_values"]
    with torch.no_grad():
        both = model.model.get_image_features(pixels).pooler_output
        alone = model.model.get_image_features(pixels[1:]).pooler_output[0]
    assert_close(both[1], alone, 1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-4 * both[0].abs().max()


@each_compressor
def test_counts_that_cannot_be_had_are_refused_with_those_that_can(tiny_student: Path, name: str) -> None:
    for tokens in (0, -1, 36, 37):
        with pytest.raises(
            CompatibilityError, match=rf"compressor {name}: {tokens} vision tokens.*--vision-tokens from"
        ) as caught:
            open_student(str(tiny_student), compressor=CompressorSpec(name, tokens))
        assert "\n" not in str(caught.value)
