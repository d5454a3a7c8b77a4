"""Token ids beyond a model's embedding: one line with both numbers before the job, for teacher and student; in a row's text a skip."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli import main
from teacher_cache.errors import CompatibilityError, SkipSample
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.preparing.token_rows import check_token_ids
from teacher_cache.records import Sample, Turn
from teacher_cache.teachers.transformers import TeacherSpec, load_processor


def folder_with(source: Path, folder: Path, rows: int = 0, **special: str) -> Path:
    """A copy of a model folder without usable weights, whose tokenizer has ``ghost-0`` to ``ghost-9`` beyond its embedding.

    Args:
        rows: of the embedding, by the configuration; 0: as it is. special: ``pad_token="ghost-9"``.
    """
    shutil.copytree(source, folder)
    processor, _ = load_processor(TeacherSpec(str(source)))
    processor.tokenizer.add_tokens([f"ghost-{number}" for number in range(10)])
    for name, token in special.items():
        setattr(processor.tokenizer, name, token)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    if rows:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["vocab_size"] = rows
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["pad", "eos", "bos"])
def test_a_special_token_beyond_the_embedding_is_named_with_both_numbers(
    tiny_teacher: Path, tmp_path: Path, name: str
) -> None:
    folder = folder_with(tiny_teacher, tmp_path / "m", **{f"{name}_token": "ghost-9"})
    processor, config = load_processor(TeacherSpec(str(folder)))
    rows, number = config.text_config.vocab_size, processor.tokenizer.convert_tokens_to_ids("ghost-9")
    with pytest.raises(
        CompatibilityError, match=rf"{name} token 'ghost-9' has id {number}, .* embedding has {rows} rows"
    ):
        Preparer(processor, config)


def test_what_the_configuration_names_is_held_against_it_too(teacher_parts, tmp_path: Path, tiny_teacher: Path) -> None:
    processor, config = load_processor(TeacherSpec(str(folder_with(tiny_teacher, tmp_path / "m"))))
    config.text_config.pad_token_id = config.text_config.vocab_size
    with pytest.raises(CompatibilityError, match=r"pad_token_id of config\.json"):
        check_token_ids(processor.tokenizer, config)
    config.text_config.pad_token_id = None
    config.image_token_id = config.text_config.vocab_size + 2
    with pytest.raises(CompatibilityError, match="the image token"):
        check_token_ids(processor.tokenizer, config)
    config.model_type = "paligemma"  # looks nothing up for it
    check_token_ids(processor.tokenizer, config)


def test_capture_and_training_say_it_before_any_weights(
    tiny_teacher: Path, tiny_cache: Path, world: Any, tmp_path: Path
) -> None:
    folder = str(folder_with(tiny_teacher, tmp_path / "m", pad_token="ghost-9"))
    data = ["--data", str(world.captions), "--image-root", str(world.images), "--template", "plain"]
    capture = ["cache-teacher", "--teacher", folder, *data, "--out", str(tmp_path / "c"), "--shards", "1"]
    train = ["train-student", "--method", "kd", "--student", folder, "--cache", str(tiny_cache), "--stages", "DFT"]
    for words in (capture, train):
        said = CliRunner().invoke(main, [*words, "--device", "cpu"] if words is capture else words)
        assert said.exit_code == 1 and isinstance(said.exception, SystemExit), said.exception
        (line,) = [line for line in said.output.splitlines() if line.startswith("Error")]
        assert "pad token 'ghost-9' has id" in line and "rows" in line
    assert not (tmp_path / "c").exists()


def test_a_rows_own_token_beyond_the_embedding_is_a_skip(tiny_teacher: Path, tmp_path: Path) -> None:
    preparer = Preparer(*load_processor(TeacherSpec(str(folder_with(tiny_teacher, tmp_path / "m")))))

    def row(answer: str) -> Sample:
        return Sample("sft", 0, "", "rows.json row 0", (Turn("user", "What?"), Turn("assistant", answer)))

    assert len(preparer.prepare(row("ghost-0 is the first of the padding rows")))
    with pytest.raises(SkipSample, match="'ghost-9'") as caught:
        preparer.prepare(row("this is ghost-9"))
    assert caught.value.reason == "unknown_token"
