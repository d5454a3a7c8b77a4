"""kd.toml: defaults < file < flags, and every mistake is one line that names the place."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.settings import CaptureSettings, Settings, load_settings, override, write_template
from teacher_cache.errors import KdcliError


def write(folder: Path, text: str) -> Path:
    (folder / "kd.toml").write_text(text)
    return folder / "kd.toml"


def test_without_a_file_there_are_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings(None) == Settings()
    with pytest.raises(KdcliError, match="`kdcli init` writes"):
        load_settings(tmp_path / "other.toml")


def test_the_template_is_valid_and_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_template(tmp_path)
    settings = load_settings(None)
    assert settings.capture.shards == 512
    # What LLaVA-1.5's labels need: its own chat template ends no answer (tests/teacher_cache/teachers/test_label_ends.py).
    assert settings.teacher is not None and "llava-1.5" in settings.teacher.id
    assert [(part.part, part.template) for part in settings.data] == [("caption", "plain"), ("sft", "v1")]
    assert settings.train.bf16 is True
    with pytest.raises(KdcliError, match="already exists"):
        write_template(tmp_path)


def test_every_commented_line_of_the_template_is_valid_too(tmp_path: Path) -> None:
    write_template(tmp_path)
    lines = (tmp_path / "kd.toml").read_text().splitlines()
    uncommented = []
    for line in lines:
        body = line.removeprefix("# ")
        is_setting = line.startswith("# ") and (body.startswith("[") or " = " in body.split("#")[0])
        uncommented.append(body if is_setting else line)
    (tmp_path / "kd.toml").write_text("\n".join(uncommented))
    settings = load_settings(tmp_path / "kd.toml")
    assert settings.fields == {"vision_topk": {"k": 8}, "vision_hidden": {"step": 0.1}}
    assert settings.stages["DPT"].per_device_train_batch_size == 32
    assert settings.capture.parts_without_fields == ("caption",)
    assert settings.teacher is not None
    assert settings.teacher.dtype == "bfloat16"


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, "[capture]\nshards = 3\nseed = 5"))
    capture = override(settings.capture, shards=9, seed=None)
    assert (capture.shards, capture.seed, capture.max_length) == (9, 5, CaptureSettings().max_length)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[captures]\nshards = 3", r"unknown section captures; known are cache, capture, data"),
        ("[capture]\nshard = 3", r"\[capture\]: unknown key shard; known are allow_skips, batch_tokens"),
        ("[teacher]\nid = 'x'\nquantization = 4", r"\[teacher\]: unknown key quantization"),
        ("[teacher]\ndtype = 'auto'", r"\[teacher\]: id is missing"),
        ("teacher = 'x'", r"\[teacher\] must be a table, got 'x'"),
        ("teacher = ''", r"\[teacher\] must be a table"),
        ("[data]\npart = 'a'\npath = 'b'", r"\[\[data\]\] with double brackets"),
        ("[[data]]\npart = 'a'", r"\[\[data\]\]: path is missing"),
        ("[[data]]\npart = 'a'\npath = 5", r"path must be text, got 5"),
        ("[[data]]\npart = 'a'\npath = 'b'\nlimit = 'ten'", r"limit must be int \| None, got 'ten'"),
        ("cache = 3", r"cache must be text"),
        ("[capture]\nshards = 'many'", r"shards must be a whole number, got 'many'"),
        ("[capture]\nshards = true", r"shards must be a whole number, got True"),
        ("[capture]\nshards = 2.5", r"shards must be a whole number"),
        ("[capture]\nshards = 0", r"\[capture\]: --shards must be at least 1, got 0"),
        ("[capture]\nfields = 'vision_topk'", r"fields must be"),
        ("[capture]\nfields = [1]", r"fields must be"),
        ("[fields.vision_topkk]\nk = 3", r"\[fields\]: unknown field vision_topkk; known are affinity"),
        ("[fields]\nvision_topk = 3", r"\[fields.vision_topk\] must be a table"),
        ("[methods.llava_kd]\ngamma = 1", r"\[methods\]: unknown method llava_kd; known are .*llava-kd"),
        ("[stages.XPT]\nmax_steps = 1", r"\[stages\]: unknown stage XPT; known are DFT"),
        ("[stages.DPT]\nmax_step = 1", r"\[stages.DPT\]: unknown key max_step"),
        ("[train]\nlearning_rate = 'fast'", r"learning_rate must be a number"),
        ("[train]\nbf16 = 1", r"bf16 must be true or false, got 1"),
        ("[train]\nsave_steps = 0", r"save_steps must be at least 1"),
        ("[train\n", r"not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(KdcliError, match=said) as caught:
        load_settings(write(tmp_path, text))
    assert "kd.toml" in str(caught.value)


def test_whole_numbers_serve_as_numbers(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, "[train]\nlearning_rate = 1")).train.learning_rate == 1


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "kd.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(KdcliError, match="not valid TOML"):
        load_settings(tmp_path / "kd.toml")
