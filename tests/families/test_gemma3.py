"""What Gemma 3 alone has: pan and scan by the folder, a vocabulary of 262,145 tokens, and what it cannot be used for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.capture.cache_teacher import capture
from pipelines.export.run import image_notes
from pipelines.judge.evaluation.answers import answer, prompt_of
from student_train.load_student import load_student
from student_train.pruning import Pruning
from teacher_cache.errors import CompatibilityError
from teacher_cache.models.text_vision import check_layers
from teacher_cache.preparing.layout import typical_tokens
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.teachers.transformers import TeacherSpec, TransformersTeacher, load_processor
from teacher_cache.wants import Wants
from tests.families.models import GEMMA_NAMED, gemma3, model_of, tokenizer_with
from tests.families.rows import mixture, read_rows, write_rows
from tests.families.test_pairs import assert_step_is_the_live_teachers

LENGTH, HEAD_ROWS = 262_145, 262_208
"""Of the published models: tokens, and rows of the head. The last token is the image's."""


def test_pan_and_scan_is_on_where_the_folder_says_so(folder_of: Callable[..., Path], rows_folder: Path) -> None:
    processor, config = load_processor(TeacherSpec(str(folder_of("gemma-3"))))
    wide = read_rows(rows_folder)[1]
    assert typical_tokens(config, processor) == 3 * 9, "640 × 480: two crops"
    on = Preparer(processor, config)
    with_crops = on.fingerprint()
    assert "do_pan_and_scan" in image_notes(config, processor)[0]
    assert [len(one.views) for one in on.prepare(wide).layout] == [3]
    for switch in (False, None):  # published folders hold null
        processor.image_processor.do_pan_and_scan = switch
        off = Preparer(processor, config)
        row = off.prepare(wide)
        assert [len(one.views) for one in row.layout] == [1] and len(row.vision_positions) == 9
        assert typical_tokens(config, processor) == 9
        assert off.fingerprint() != with_crops and not image_notes(config, processor)


def test_questions_are_panned_as_rows_are(
    folder_of: Callable[..., Path], rows_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_student(str(folder_of("gemma-3")), "sdpa")
    read: list[int] = []
    generate = type(model).generate

    def counting(self: Any, pixel_values: torch.Tensor, **given: Any) -> torch.Tensor:
        read.append(len(pixel_values))
        return generate(self, pixel_values=pixel_values, **given)

    monkeypatch.setattr(type(model), "generate", counting)
    answer(model.eval(), processor, [prompt_of(read_rows(rows_folder)[1])], max_new_tokens=2)
    processor.image_processor.do_pan_and_scan = False
    answer(model, processor, [prompt_of(read_rows(rows_folder)[1])], max_new_tokens=2)
    assert read == [3, 1]


def wide_tokenizer(folder: Path) -> Any:
    """The demo's, with words that no text becomes before the family's three."""
    from benchmarks.demo_training.tokenizer import TOKENIZER_FOLDER

    folder.mkdir()
    for file in TOKENIZER_FOLDER.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    described = json.loads((folder / "tokenizer.json").read_text())
    words = described["model"]["vocab"]
    words |= {f"<unused{number}>": number for number in range(len(words), LENGTH - 3)}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return tokenizer_with(folder=folder, **GEMMA_NAMED)


@pytest.mark.exhaustive  # steps of a small Gemma 3, and ids of 19 bits by themselves, stand for it
def test_a_vocabulary_of_262145_tokens(make_request: Any, open_step: Callable[..., Any], tmp_path: Path) -> None:
    """Top-k ids need 19 bits; a step is the live teacher's."""
    tokenizer = wide_tokenizer(tmp_path / "words")
    folders = {}
    for name, width, seed in (("teacher", 16, 1), ("student", 24, 2)):
        config, processor = gemma3(width, HEAD_ROWS - LENGTH, seed, tokenizer)
        assert config.text_config.vocab_size == HEAD_ROWS and config.image_token_id == LENGTH - 1
        model = model_of(config, seed)
        with torch.no_grad():  # so that the last token of all is among the likeliest
            model.get_output_embeddings().weight[LENGTH - 1] *= 4
        folders[name] = tmp_path / name
        model.save_pretrained(folders[name])
        processor.save_pretrained(folders[name])
    rows = write_rows(tmp_path / "rows")
    for file, keep in (("chat.json", 0), ("captions.json", 1)):  # a square picture each: no crops
        (rows / file).write_text(json.dumps([json.loads((rows / file).read_text())[keep]]))

    fields = ("response_topk", "response_hidden")
    capture(make_request(tmp_path / "cache", data=mixture(rows), teacher=folders["teacher"], fields=fields, shards=2))
    trainer, one = open_step(tmp_path / "cache", folders["student"], "kd")
    assert_step_is_the_live_teachers(tmp_path / "cache", folders["teacher"], trainer, one)
    assert_topk_is_the_teachers(tmp_path / "cache", folders["teacher"])


def assert_topk_is_the_teachers(folder: Path, teacher: Path) -> None:
    spec = TeacherSpec(str(teacher), device="cpu")
    processor, config = load_processor(spec)
    live = TransformersTeacher(spec, processor, config)
    assert live.vocabulary == LENGTH
    row = CachedSamples(TeacherCache(str(folder)), ("sft",), ("response_topk",)).read(0, 0)
    stored = row.fields["response_topk"]
    prepared = Preparer(processor, config).prepare(row.sample)
    (said,) = live([prepared], Wants(topk={"response": stored.ids.shape[1]}))
    assert torch.equal(stored.ids, said.topk["response"].ids)
    assert (stored.ids == LENGTH - 1).any()


def test_what_needs_causal_layers_is_refused(folder_of: Callable[..., Path]) -> None:
    config = load_processor(TeacherSpec(str(folder_of("gemma-3"))))[1]
    with pytest.raises(CompatibilityError, match="cannot be removed inside a gemma3_text language model"):
        Pruning("dart", layer=1, keep=2).check(config)
    with pytest.raises(CompatibilityError, match="attention of Gemma3Attention cannot be computed apart"):
        check_layers(Wants(attention={0: "mean"}), config)
