"""Model folders that describe what they are not: one line that names the file, before anything is built, fetched or run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from student_train.load_student import load_student, open_student
from teacher_cache.errors import KdcliError
from teacher_cache.models.files import check_model_files
from teacher_cache.teachers.backends import open_teacher
from teacher_cache.teachers.transformers import TeacherSpec, TransformersTeacher, load_processor

Folder = Callable[[], Path]


@pytest.fixture
def folder(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return shutil.copytree(tiny_teacher, tmp_path / "model")


def edit(path: Path, **entries: Any) -> None:
    """Keys ``a.b`` reach into objects; a number that is no JSON is written as Python does (NaN, Infinity)."""
    body = json.loads(path.read_text()) if path.exists() else {}
    for key, value in entries.items():
        *parents, last = key.split(".")
        place = body
        for one in parents:
            place = place.setdefault(one, {})
        place[last] = value
    path.write_text(json.dumps(body))


def refused(folder: Path, weights: bool = False, trusted: bool = False) -> str:
    """The line that both sides say of it, of the teacher's; quickly."""
    lines = []
    spec = TeacherSpec(str(folder), device="cpu", trust_remote_code=trusted)
    for load in (
        lambda: open_teacher(spec, *load_processor(spec)) if weights else load_processor(spec),
        lambda: load_student(str(folder), "sdpa", trusted) if weights else open_student(str(folder), trusted),
    ):
        started = time.monotonic()
        with pytest.raises(KdcliError) as caught:
            load()
        assert time.monotonic() - started < 10
        assert len(str(caught.value).splitlines()) == 1 and str(folder) in str(caught.value), caught.value
        lines.append(str(caught.value))
    return lines[0]


SIZES = [
    ("text_config.num_hidden_layers", 1_000_000_000),
    ("text_config.num_hidden_layers", 0),
    ("text_config.num_hidden_layers", -1),
    ("text_config.num_hidden_layers", 2.0),
    ("text_config.num_hidden_layers", 1e9),
    ("text_config.num_hidden_layers", "2"),
    ("text_config.num_hidden_layers", True),
    ("text_config.num_hidden_layers", [2]),
    ("text_config.num_hidden_layers", float("nan")),
    ("text_config.num_attention_heads", 0),
    ("text_config.num_attention_heads", 10**9),
    ("text_config.num_key_value_heads", 0),
    ("text_config.num_key_value_heads", 3),
    ("text_config.hidden_size", 10**9),
    ("text_config.hidden_size", 0),
    ("text_config.intermediate_size", 10**9),
    ("text_config.vocab_size", 10**9),
    ("text_config.vocab_size", -5),
    ("text_config.head_dim", 10**9),
    ("text_config.max_position_embeddings", 10**12),
    ("text_config.num_experts", 10**9),
    ("vision_config.num_hidden_layers", 10**9),
    ("vision_config.image_size", 10**9),
    ("vision_config.image_size", float("inf")),
    ("vision_config.patch_size", 0),
    ("vision_config.patch_size", "14"),
    ("vision_config.num_channels", 10**9),
    ("text_config", 5),
    ("vision_config", "clip"),
    ("text_config.model_type", 7),
    ("text_config.model_type", "nobody"),
    ("model_type", 3),
    ("model_type", None),
    ("architectures", "LlavaForConditionalGeneration"),
    ("architectures", [1]),
    ("image_token_id", "many"),
    ("vision_feature_layer", "last"),
    ("dtype", "load"),
    ("dtype", "auto"),
    ("dtype", {"": "bfloat16"}),
    ("text_config.torch_dtype", "nn"),
]


@pytest.mark.parametrize(("key", "value"), SIZES, ids=[f"{key}={value}" for key, value in SIZES])
def test_sizes_that_no_model_has(folder: Path, key: str, value: Any) -> None:
    edit(folder / "config.json", **{key: value})
    refused(folder)


REACHING = [
    ("config.json", "_attn_implementation", "org/x"),
    ("config.json", "attn_implementation", "org/x@main:forward"),
    ("config.json", "attn_implementation", {"": "sdpa", "text_config": "org/x"}),
    ("config.json", "text_config._attn_implementation", "paged|org/x"),
    ("config.json", "text_config.attn_implementation", "org/x"),
    ("config.json", "vision_config._attn_implementation_internal", "org/x"),
    ("config.json", "_experts_implementation", "deepgemm"),
    ("config.json", "text_config.experts_implementation", "org/x"),
    ("config.json", "use_kernels", True),
    ("config.json", "kernel_config", {"RMSNorm": "org/x:RMSNorm"}),
    ("config.json", "quantization_config", {"quant_method": "mxfp4"}),
    ("config.json", "quantization_config", {"quant_method": "org.module"}),
    ("config.json", "text_config.quantization_config", {"quant_method": "fbgemm_fp8"}),
    ("config.json", "vision_config.auto_map", {"AutoModel": "own.OwnModel"}),
    ("config.json", "vision_config.backbone", "org/x"),
    ("config.json", "vision_config.use_pretrained_backbone", True),
    ("config.json", "text_config.trust_remote_code", True),
    ("generation_config.json", "custom_generate", "org/x"),
    ("generation_config.json", "compile_config", {"backend": "org.module"}),
    ("processor_config.json", "processor_class", "AutoModel"),
    (
        "processor_config.json",
        "audio_tokenizer",
        {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "org/x"},
    ),
    ("processor_config.json", "image_processor.image_processor_type", "Trainer"),
    ("processor_config.json", "processor_class", 3),
    ("tokenizer_config.json", "tokenizer_class", "LlamaForCausalLM"),
    ("tokenizer_config.json", "vocab_file", "/etc/hostname"),
]


@pytest.mark.parametrize(
    ("file", "key", "value"), REACHING, ids=[f"{file}:{key}={value}" for file, key, value in REACHING]
)
def test_what_leads_elsewhere(folder: Path, file: str, key: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(folder / file, **{key: value})
    said = refused(folder)
    assert file in said and key.split(".")[-1] in said and "--trust-remote-code" in said


@pytest.mark.parametrize("value", ["eager", "sdpa", "flash_attention_2", None])
def test_known_ways_of_attention_are_taken(folder: Path, value: str | None) -> None:
    edit(folder / "config.json", _attn_implementation=value, **{"text_config._attn_implementation": value})
    load_processor(TeacherSpec(str(folder), device="cpu"))


@pytest.mark.parametrize("key", ["_attn_implementation", "text_config._attn_implementation", "attn_implementation"])
def test_the_attention_that_was_asked_for_counts(folder: Path, key: str) -> None:
    """Published folders name flash attention, whose package not every machine has."""
    edit(folder / "config.json", **{key: "flash_attention_2"})
    assert load_student(str(folder), "sdpa")[0].config._attn_implementation == "sdpa"
    spec = TeacherSpec(str(folder), dtype="float32", device="cpu", attn_implementation="eager")
    teacher = TransformersTeacher(spec, *load_processor(spec))
    assert teacher.model.config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("key", "value"), [("_attn_implementation", {"": "sdpa", "text_config": "eager"}), ("torch_dtype", "auto")]
)
def test_plain_words_of_published_folders(folder: Path, key: str, value: Any) -> None:
    edit(folder / "config.json", **{key: value})
    check_model_files("model", str(folder))


def test_what_was_trusted_is_obeyed(folder: Path) -> None:
    edit(folder / "config.json", attn_implementation="org/x")
    load_processor(TeacherSpec(str(folder), trust_remote_code=True))


@pytest.mark.parametrize("trusted", [False, True])
def test_other_files_in_the_place_of_those_that_are_looked_at(folder: Path, trusted: bool) -> None:
    (folder / "other").mkdir()
    edit(folder / "config.json", transformers_weights="other/model.safetensors")
    assert "transformers_weights" in refused(folder, trusted=trusted)
    edit(folder / "config.json", transformers_weights=None, configuration_files=["config.4.0.0.json"])
    assert "configuration_files" in refused(folder, trusted=trusted)


def test_an_adapter_beside_the_weights(folder: Path) -> None:
    edit(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="org/x")
    assert "merge it" in refused(folder)


BROKEN = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "a list": lambda path: path.write_text("[]"),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "deep": lambda path: path.write_text('{"a":' * 50_000 + "1" + "}" * 50_000),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link out": lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json", "processor_config.json"])
def test_files_that_are_none(folder: Path, file: str, how: str) -> None:
    BROKEN[how](folder / file)
    refused(folder)


def test_text_from_elsewhere_does_not_become_a_template(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("what is mine")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    assert "a link that leads out" in refused(folder)


def test_the_links_of_the_hubs_cache_are_no_links_out(tiny_teacher: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--o--m" / "blobs", tmp_path / "models--o--m" / "snapshots" / "abc"
    shutil.copytree(tiny_teacher, blobs)
    snapshot.mkdir(parents=True)
    for one in blobs.iterdir():
        (snapshot / one.name).symlink_to(f"../../blobs/{one.name}")
    spec = TeacherSpec(str(snapshot), device="cpu")
    open_teacher(spec, *load_processor(spec))


INDICES = {
    "a list": {"weight_map": []},
    "none": {},
    "numbers": {"weight_map": {"lm_head.weight": 3}},
    "null": {"weight_map": {"lm_head.weight": None}},
    "out of the folder": {"weight_map": {"lm_head.weight": "../model.safetensors"}},
    "absolute": {"weight_map": {"lm_head.weight": "/etc/passwd"}},
    "a folder below": {"weight_map": {"lm_head.weight": "below/model.safetensors"}},
    "a pickle": {"weight_map": {"lm_head.weight": "pytorch_model.bin"}},
    "a missing file": {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}},
    "a missing tensor": {"weight_map": {"nobody.weight": "model-00001.safetensors"}},
    "text": {"weight_map": "model-00001.safetensors"},
}


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_of_weights(folder: Path, kind: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, **INDICES[kind]}))
    said = refused(folder, weights=True)
    assert "weight_map" in said or "index.json" in said


def test_shards_of_a_whole_model_are_read(folder: Path) -> None:
    from transformers import AutoModelForImageTextToText

    spec = TeacherSpec(str(folder), device="cpu")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    open_teacher(spec, *load_processor(spec))


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    body = json.loads(data[8 : 8 + length])
    change(body)
    made = json.dumps(body).encode()
    path.write_bytes(len(made).to_bytes(8, "little") + made + data[8 + length :])


TENSOR = "language_model.model.embed_tokens.weight"
HEADERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a shape that is too large": lambda body: body[TENSOR].update(shape=[10**9, 10**9]),
    "a negative shape": lambda body: body[TENSOR].update(shape=[-1, 4]),
    "offsets behind the end": lambda body: body[TENSOR].update(data_offsets=[0, 10**15]),
    "an unknown type": lambda body: body[TENSOR].update(dtype="Q7"),
    "a tensor less": lambda body: body.update({"other.weight": body.pop(TENSOR)}),
    "other sides": lambda body: body[TENSOR].update(shape=body[TENSOR]["shape"][::-1]),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_of_weights_that_lies(folder: Path, kind: str) -> None:
    header(folder / "model.safetensors", HEADERS[kind])
    assert "weights" in refused(folder, weights=True)


GROWN = [
    ("text_config.num_hidden_layers", 4000),
    ("text_config.num_hidden_layers", 40),
    ("text_config.hidden_size", 1 << 16),
    ("text_config.intermediate_size", 1 << 20),
    ("text_config.vocab_size", 1 << 24),
    ("vision_config.image_size", 1 << 15),
]


@pytest.mark.parametrize(("key", "value"), GROWN, ids=[f"{key}={value}" for key, value in GROWN])
def test_a_configuration_larger_than_its_weights(folder: Path, key: str, value: int) -> None:
    edit(folder / "config.json", **{key: value})
    refused(folder, weights=True)


BACKTRACKING = ["(a+)+$", "(a|a)*$", "( +)+$", "("]


@pytest.mark.parametrize("pattern", BACKTRACKING)
def test_a_tokenizer_whose_pattern_breaks_its_library(
    folder: Path, pattern: str, capfd: pytest.CaptureFixture[str]
) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    edit(folder / "tokenizer.json", pre_tokenizer=split)
    assert "tokenizer" in refused(folder)
    assert capfd.readouterr().err == ""


def test_huge_ids_of_added_tokens(folder: Path) -> None:
    body = json.loads((folder / "tokenizer.json").read_text())
    body["added_tokens"].append({**body["added_tokens"][0], "id": 2**32 - 1, "content": "<far>"})
    (folder / "tokenizer.json").write_text(json.dumps(body))
    spec = TeacherSpec(str(folder), device="cpu")
    try:  # taken as what it is, or refused
        open_teacher(spec, *load_processor(spec))
    except KdcliError as error:
        assert len(str(error).splitlines()) == 1


def test_odd_lengths_of_a_tokenizer(folder: Path) -> None:
    for value in (10**30, 0, -1, 1e300, "long", None):
        edit(folder / "tokenizer_config.json", model_max_length=value)
        try:
            load_processor(TeacherSpec(str(folder), device="cpu"))
        except KdcliError as error:
            assert len(str(error).splitlines()) == 1


def test_the_programs_one_line(folder: Path, world_json: Any) -> None:
    """A real process: rc 1, one line, nothing of a library's own words."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    edit(folder / "tokenizer.json", pre_tokenizer=split)
    data = ["--data", str(world_json.captions), "--image-root", str(world_json.images), "--template", "plain"]
    command = [sys.executable, "-P", "-m", "cli", "doctor", *data, "--teacher", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "RUST_BACKTRACE": "1"})
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "tokenizer.json" in done.stderr and "panicked" not in done.stderr


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_under_any_key(
    tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Only ``KdcliError`` comes out of a configuration of which one entry is anything."""
    body = json.loads((tiny_teacher / "config.json").read_text())
    places = [body, body["text_config"], body["vision_config"]]
    place = data.draw(st.sampled_from(places))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(VALUES)
    folder = tmp_path_factory.mktemp("any") / "model"
    shutil.copytree(tiny_teacher, folder, copy_function=os.link)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(body))
    spec = TeacherSpec(str(folder), device="cpu")
    try:
        open_teacher(spec, *load_processor(spec))
    except KdcliError as error:
        assert len(str(error).splitlines()) == 1
