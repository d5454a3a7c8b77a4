"""The command line as a user types it: the two literal commands work, and every mistake is one line and leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result: Result, *said: str) -> None:
    """One line that says all of ``said``, and a status other than 0; a traceback would be another exception."""
    assert result.exit_code != 0, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    for words in said:
        assert re.search(words, lines[0]), lines[0]
    assert "Traceback" not in result.output


@pytest.fixture
def arguments(tiny_teacher: Path, world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Flags of a capture that works; the current folder is empty."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    return {
        "--teacher": str(tiny_teacher),
        "--data": str(world.captions),
        "--image-root": str(world.images),
        "--template": "plain",
        "--part": "captions",
        "--out": str(tmp_path / "cache"),
        "--shards": "2",
        "--fields": "response_topk",
        "--device": "cpu",
    }


def capture(arguments: dict[str, str], **changes: str | None) -> Result:
    merged = arguments | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    flags = [part for name, value in merged.items() if value is not None for part in (name, value)]
    return run("cache-teacher", *flags)


def test_a_capture_by_flags(arguments, tmp_path: Path) -> None:
    result = capture(arguments)
    assert result.exit_code == 0, result.output
    assert "10 rows in 2 shards" in result.stdout
    again = run("cache", "status", arguments["--out"], "--json")
    assert json.loads(again.stdout)["columns"]["fields/response_topk"]["written"] == 10
    assert run("cache", "verify", arguments["--out"]).stdout == "every checksum holds\n"
    assert "response" in run("cache", "inspect", arguments["--out"], "--row", "3").stdout.lower()
    listed = run("cache", "urls", arguments["--out"], "response_topk").stdout.split()
    assert len(listed) == 2 and all(Path(tar).is_file() for tar in listed)
    assert "0 files" in run("cache", "gc", arguments["--out"]).stdout
    refused(run("cache", "inspect", arguments["--out"], "--row", "10"), "10 samples")
    refused(run("cache", "urls", arguments["--out"], "nothing"), "no field nothing; it has response_topk")


def test_verify_names_the_damage_and_fails(arguments) -> None:
    assert capture(arguments).exit_code == 0
    tar = next(Path(arguments["--out"]).glob("samples/data/*"))
    tar.write_bytes(tar.read_bytes()[:-1])
    result = run("cache", "verify", arguments["--out"], "--json")
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)
    assert tar.name in problem["what"]


def test_init_and_the_two_commands(
    tiny_teacher: Path, tiny_student: Path, world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``kdcli init``, edit the names in kd.toml, then both commands without a flag more than the README has."""
    monkeypatch.chdir(tmp_path)
    assert run("init").exit_code == 0
    refused(run("init"), "already exists")
    edits = {
        '"llava-hf/llava-1.5-7b-hf"': f'"{tiny_teacher}"',
        '"path/to/student"': f'"{tiny_student}"',
        '"data/blip_laion_cc_sbu_558k.json"': f'"{world.captions}"',
        '"data/llava_v1_5_mix665k.json"': f'"{world.train}"',
        '"data/pretrain_images"': f'"{world.images}"',
        '"data/images"': f'"{world.images}"',
        "bf16 = true": "bf16 = false",
        "gradient_accumulation_steps = 16": "gradient_accumulation_steps = 1\nmax_steps = 1",
        "dataloader_num_workers = 4": "dataloader_num_workers = 0",
        'template = "v1"': 'template = "chat"',
    }
    text = (tmp_path / "kd.toml").read_text()
    for old, new in edits.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "kd.toml").write_text(text)
    captured = run("cache-teacher", "--shards", "6")
    assert captured.exit_code == 0, captured.output
    assert "31 rows in 6 shards at cache" in captured.stdout
    trained = run("train-student", "--method", "llava-kd")
    assert trained.exit_code == 0, (trained.output, trained.exception)
    model = Path(trained.stdout.strip().splitlines()[-1].removeprefix("student: "))
    assert (model / "model.safetensors").is_file()
    refused(run("cache-teacher", "--shards", "7"), "holds another plan", "slices: cache has 6, here 7")


def test_without_anything_it_says_how_to_begin(arguments) -> None:
    refused(run("cache-teacher"), "no --teacher", "kdcli init")
    refused(run("cache-teacher", "--teacher", arguments["--teacher"]), "no --data", "kdcli init")
    refused(capture(arguments, out=None), "no --out", "kdcli init")
    refused(run("doctor"), "no data", "kdcli init")
    refused(run("cache", "status"), "no cache", "kdcli init")
    refused(run("train-student"), "no cache", "kdcli init")


BAD = [
    ({"shards": "0"}, ["--shards must be at least 1"]),
    ({"shards": "-3"}, ["--shards must be at least 1"]),
    ({"shards": "11"}, ["more than the 10 rows", "use at most --shards 10"]),
    ({"fields": "response_topk,depth"}, ["unknown field 'depth'", "affinity, attention, relation, response_hidden"]),
    ({"teacher": "nowhere/model"}, ["'nowhere/model' cannot be loaded", "model folder or a hub id"]),
    ({"data": "missing.json"}, ["missing.json"]),
    ({"image_root": "no/such/folder"}, ["no/such/folder"]),
    ({"template": "vicuna"}, ["unknown template 'vicuna'", "chat, plain"]),
    ({"k": "0"}, ["k must be at least 1"]),
    ({"max_length": "0"}, ["--max-length must be at least 1"]),
    ({"batch_tokens": "-1"}, ["--batch-tokens must be at least 1"]),
    ({"workers": "-1"}, ["--workers must not be negative"]),
    ({"limit": "-1"}, ["limit is -1"]),
    ({"dtype": "int4"}, ["dtype 'int4'", "bfloat16"]),
    ({"fields": "vision_hidden", "codec": "jpeg"}, ["unknown codec 'jpeg'", "bf16, fp32, int4, int8, sketch"]),
    ({"parts_without_fields": "sft"}, ["parts_without_fields", "sft", "captions"]),
    ({"device": "gpu"}, ["device 'gpu'", "cuda:N"]),
    ({"device": "cuda:99"}, ["this machine has \\d+ CUDA devices"]),
    ({"config": "other.toml"}, ["other.toml: no such file"]),
]


@pytest.mark.parametrize(("changes", "said"), BAD)
def test_bad_flags_leave_nothing_behind(arguments, changes: dict[str, str], said: list[str]) -> None:
    refused(capture(arguments, **changes), *said)
    assert not Path(arguments["--out"]).exists()


def test_unreadable_mixtures(arguments, tmp_path: Path) -> None:
    for content in (b"{not json", b"", b'{"a": 1}', b"\x00\x01\x02"):
        bad = tmp_path / "bad.json"
        bad.write_bytes(content)
        refused(capture(arguments, data=str(bad)), r"bad\.json")
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 no parquet PAR1")
    refused(capture(arguments, data=str(bad), image_root=None), r"bad\.parquet")
    assert not Path(arguments["--out"]).exists()


def test_unknown_keys_in_kd_toml(arguments, tmp_path: Path) -> None:
    Path("kd.toml").write_text("[capture]\nshard = 3\n")
    refused(capture(arguments), r"kd\.toml \[capture\]: unknown key shard", "shards")
    Path("kd.toml").write_text("[fields.vision_topkk]\nk = 3\n")
    refused(capture(arguments), "unknown field vision_topkk")
    assert not Path(arguments["--out"]).exists()


def test_folders_that_are_no_cache(tmp_path: Path, world) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for command in ("status", "verify", "inspect", "gc", "urls"):
        for place in (tmp_path / "nothing", world.folder, file):
            refused(run("cache", command, place), "no cache here", "kdcli cache-teacher")
    assert not (tmp_path / "nothing").exists()
    refused(run("cache", "status", "s3x://bucket/cache"), "s3x")


def test_an_output_that_is_a_file(arguments, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    refused(capture(arguments, out=str(tmp_path / "file")), "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_cache_of_other_flags_is_refused_and_untouched(arguments, tiny_student: Path, world) -> None:
    assert capture(arguments).exit_code == 0
    out = Path(arguments["--out"])
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    refused(capture(arguments, shards="3"), "holds another plan", "slices: cache has 2, here 3")
    refused(capture(arguments, template="chat"), r"parts\.captions\.template: cache plain, here chat")
    refused(capture(arguments, data=world.train), "holds another plan", r"parts\.")
    refused(capture(arguments, teacher=str(tiny_student)), r"teacher\.hidden_size: cache 48, here 32")
    refused(capture(arguments, k="3"), r"params\.k: cache 64, here 3")
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before


def test_another_tokenizer_or_chat_template_is_refused(arguments, tiny_teacher: Path, tmp_path: Path) -> None:
    assert capture(arguments).exit_code == 0
    other = Path(shutil.copytree(tiny_teacher, tmp_path / "other"))
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "<|end|>\\n"))
    refused(capture(arguments, teacher=str(other)), r"preparation\.chat_template: cache \w+…\w+, here")
    shutil.copy(tiny_teacher / "chat_template.jinja", template)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(capture(arguments, teacher=str(other)), r"preparation\.tokenizer\.sha256")


def test_a_teacher_without_a_chat_template_is_told_before_anything_is_written(
    arguments, tiny_teacher: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_teacher, tmp_path / "other"))
    (other / "chat_template.jinja").unlink()
    refused(capture(arguments, teacher=str(other), template="chat"), "no chat template", "plain")
    assert not Path(arguments["--out"]).exists()
    assert capture(arguments, teacher=str(other)).exit_code == 0


def test_weights_that_are_missing_or_broken(arguments, tiny_teacher: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_teacher, tmp_path / "other"))
    (other / "model.safetensors").unlink()
    refused(capture(arguments, teacher=str(other)), "no \\*.safetensors", "save_pretrained")
    assert not Path(arguments["--out"]).exists()
    (other / "model.safetensors").write_bytes(b"broken")
    refused(capture(arguments, teacher=str(other)), "other", "cannot be loaded")
    refused(capture(arguments, teacher=str(other), workers="2"), "cannot be loaded|worker")


def test_options_given_once_or_once_each(arguments, world) -> None:
    flags = ["--data", world.captions, "--data", world.heldout, "--data", world.heldout]
    twice = ["--image-root", world.images, "--image-root", world.images]
    rest = ["--teacher", arguments["--teacher"], "--out", arguments["--out"], "--shards", "3"]
    refused(run("cache-teacher", *flags, *twice, *rest), "--image-root was given 2 times for 3 --data")


def test_help_says_the_names_that_parts_get() -> None:
    from pipelines.command_line.given import data_specs

    assert [one.part for one in data_specs(("a.json", "b.json"), template=("plain", "chat"))] == ["caption", "sft"]
    for command in ("doctor", "cache-teacher", "plan"):
        assert "default: caption with --template plain, else sft)" in " ".join(run(command, "--help").output.split())


def test_help_of_every_command() -> None:
    assert run("--help").exit_code == 0
    for command in main.commands:
        assert run(command, "--help").exit_code == 0
    for command in main.commands["cache"].commands:
        assert run("cache", command, "--help").exit_code == 0
