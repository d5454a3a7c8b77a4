"""A teacher and students that read text-only, by every command along the way; what they cannot have is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import cli
from benchmarks.text_student import write_student
from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.edit.fields import add_fields
from pipelines.export.run import ExportRequest, export
from pipelines.inspect.cache import survey
from pipelines.settings import CaptureSettings, Settings
from pipelines.train.train_student import train
from student_train.config import TrainSettings
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.transformers import TeacherSpec
from tests.pipelines.processes.test_processes import command
from tests.text_models import build_text_folder, write_rows
from tests.warm import Warm

ROWS = 36


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``teacher`` (three layers), ``student`` (two of them) and ``rows.jsonl``."""
    folder = tmp_path_factory.mktemp("text")
    build_text_folder(folder / "teacher", layers=3)
    write_student(folder / "teacher", folder / "student", 2)
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


def request_of(here: Path, out: Path, teacher: str = "", data: str = "rows.jsonl", **settings: Any) -> CaptureRequest:
    capture_settings = replace(CaptureSettings(), **{"shards": 3, "store": "exact", "workers": 1, **settings})
    spec = TeacherSpec(teacher or str(here / "teacher"), dtype="float32", device="cpu")
    return CaptureRequest(spec, (DataSpec("sft", str(here / data)),), str(out), capture_settings, {})


@pytest.fixture(scope="module")
def cache(here: Path) -> Path:
    capture(request_of(here, here / "cache"))
    return here / "cache"


def settings_of(student: Path, output: Path, **changes: Any) -> Settings:
    base = TrainSettings(student=str(student), output_dir=str(output), report_to="none", per_device_train_batch_size=4)
    return Settings(train=replace(base, **{"max_steps": 2, **changes}))


def kdcli(*words: object) -> str:
    done = CliRunner().invoke(cli.main, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@torch.inference_mode()
def test_from_the_teacher_to_a_student_that_answers_and_stops(tmp_path: Path) -> None:
    """A tiny teacher learns eight answers by ``sft``; it is cached; a student of fewer layers learns them from the cache by ``kd``; plain
    transformers loads the export, says the answers and stops."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    build_text_folder(tmp_path / "start", width=48, layers=3)
    write_rows(tmp_path / "rows.jsonl", 8, seed=3)
    learn = {"learning_rate": 3e-3, "max_steps": 60, "per_device_train_batch_size": 8, "warmup_ratio": 0.1}
    with torch.inference_mode(False):
        capture(request_of(tmp_path, tmp_path / "rows", str(tmp_path / "start"), store="none", shards=1))
        made = train(str(tmp_path / "rows"), "sft", settings_of(tmp_path / "start", tmp_path / "sft", **learn))
        teacher = Path(made["model"])
        capture(request_of(tmp_path, tmp_path / "cache", str(teacher), shards=1))
        write_student(teacher, tmp_path / "student", 2)
        made = train(str(tmp_path / "cache"), "kd", settings_of(tmp_path / "student", tmp_path / "kd", **learn))
    assert [one["stage"] for one in made["stages"]] == ["DFT"]
    for folder in (teacher, tmp_path / "kd"):
        one = json.loads(kdcli("eval", folder, "--data", tmp_path / "rows.jsonl", "--json"))
        assert one["n"] == 8 and one["exact_match"] == 1.0 and one["nll"] < 0.1
    export(ExportRequest(tmp_path / "kd", tmp_path / "exported", check=True))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert model.config.num_hidden_layers == 2
    messages = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["messages"]
    asked = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    said = model.generate(**asked, do_sample=False, max_new_tokens=32)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(said) == messages[-1]["content"] + "<|end|>"
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "AutoModelForCausalLM" in card and "AutoProcessor" not in card


def test_every_command_takes_a_teacher_of_text(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher, rows = ("--teacher", here / "teacher"), ("--data", here / "rows.jsonl")
    student = ("--student", here / "student")
    assert f"{ROWS} usable" in kdcli("doctor", here / "rows.jsonl", *teacher)
    planned = json.loads(kdcli("plan", *teacher, *rows, "--shards", 2, "--json"))
    fields = ["fields/response_topk", "fields/response_hidden"]
    assert [one["name"] for one in planned["columns"]] == ["samples", *fields] and planned["hours"]["flops"] > 0
    tried = ("--rows", ROWS, "--shards", 2, "--max-kl", 9, "--fidelity", 90)
    went = json.loads(kdcli("preflight", *teacher, *student, *rows, *tried, "--json", "--no-write"))
    assert went["go"] and [one["method"] for one in went["methods"]] == ["kd"]
    kdcli("cache-teacher", *teacher, *rows, "--out", "cache", "--shards", 2)
    kdcli("cache-teacher", *teacher, *rows, "--out", "adopted", "--shards", 2, "--store", "exact")
    kdcli("cache", "add-field", "cache", "--field", "response_sampled", *teacher)
    assert "every checksum holds" in kdcli("cache", "verify", "cache")
    assert "assistant:" in kdcli("cache", "inspect", "cache") and "response_sampled" in kdcli(
        "cache", "status", "cache"
    )
    compared = json.loads(kdcli("fidelity", "--cache", "cache", *teacher, *student, "--samples", 4, "--json"))
    assert set(compared["terms"]) == {f"{one}, response" for one in ("forward KL", "reverse KL", "JSD")}
    assert not compared["unserved"]
    for column in ("samples", "fields/response_hidden"):
        tar = min((tmp_path / "adopted" / column / "data").iterdir())
        tar.write_bytes(tar.read_bytes()[:700])
    kdcli("cache", "repair", "adopted", *teacher, *rows)
    assert "every checksum holds" in kdcli("cache", "verify", "adopted")
    kdcli("report", "--help")


METHODS = ("kd", "minillm-offline", "distillm-offline", "jsd", "sft")


def test_the_methods_that_need_no_images_train(here: Path, cache: Path, tmp_path: Path) -> None:
    for method in METHODS:
        made = train(str(cache), method, settings_of(here / "student", tmp_path / method))
        assert load_file(Path(made["model"]) / "model.safetensors") and len(made["stages"]) == 1


def test_vision_methods_are_refused_by_name_before_any_model_loads(
    here: Path, cache: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    for method in ("llava-kd", "em-kd", "align-kd", "epic-tcd", "epic-lcd"):
        with pytest.raises(CompatibilityError, match=rf"method {method} needs .*is text-only: use .*kd.*sft") as one:
            train(str(cache), method, settings_of(here / "student", tmp_path / "run"))
        assert "\n" not in str(one.value) and "student" in str(one.value)
        with pytest.raises(CompatibilityError, match=rf"method {method} needs .*the teacher of .*is text-only"):
            train(str(cache), method, settings_of(tiny_student, tmp_path / "run"))
    with pytest.raises(CompatibilityError, match="stage PT trains the projector alone"):
        train(str(cache), "kd", settings_of(here / "student", tmp_path / "run"), "PT,DFT")
    with pytest.raises(KdcliError, match="compressor"):
        train(str(cache), "kd", settings_of(here / "student", tmp_path / "run", compressor="adaptive_pool"))
    line = ("--teacher", here / "teacher", "--student", here / "student", "--data", here / "rows.jsonl")
    said = CliRunner().invoke(cli.main, [*map(str, ("preflight", *line, "--methods", "kd,llava-kd"))])
    assert said.exit_code == 1 and "method llava-kd needs" in said.output and "teacher" in said.output


def test_fields_of_images_are_refused_by_name(here: Path, cache: Path, tmp_path: Path) -> None:
    for name in ("vision_topk", "affinity", "relation", "attention", "vision_features"):
        with pytest.raises(CompatibilityError, match=rf"field {name} .*text-only.*response_topk"):
            capture(request_of(here, tmp_path / "out", fields=("response_topk", name)))
        with pytest.raises(CompatibilityError, match=rf"field {name} .*text-only"):
            add_fields(str(cache), TeacherSpec(str(here / "teacher")), {name: {}}, CaptureSettings(workers=1))
    assert not (tmp_path / "out").exists()


def with_images(here: Path, folder: Path, pictured: int) -> Path:
    """The rows as LLaVA json, the first so many with an image."""
    talks = []
    for number, line in enumerate((here / "rows.jsonl").read_text().splitlines()):
        first, second = [m["content"] for m in json.loads(line)["messages"] if m["role"] != "system"][:2]
        image = {"image": "there_is_none.png"} if number < pictured else {}
        placed = "<image>\n" if image else ""
        turns = [{"from": "human", "value": placed + first}, {"from": "gpt", "value": second}]
        talks.append({"id": str(number), **image, "conversations": turns})
    (folder / "mixed.json").write_text(json.dumps(talks))
    import PIL.Image

    PIL.Image.new("RGB", (32, 32)).save(folder / "there_is_none.png")
    return folder / "mixed.json"


def test_rows_with_images_are_skip_records(here: Path, tmp_path: Path) -> None:
    """Told before the job, counted with their reason; no excess, however many: they are what the user chose. All of them are refused."""
    mixed, warnings = with_images(here, tmp_path, 9), list[str]()
    said = capture(request_of(here, tmp_path / "cache", data=str(mixed)), warn=warnings.append)
    assert any("rows with images (9 images) are skipped: the teacher is text-only" in line for line in warnings)
    assert "excess" not in said and said["columns"]["samples"]["skipped"] == {"images_unread": 9}
    assert said["columns"]["fields/response_hidden"]["written"] == ROWS - 9
    assert not survey(str(tmp_path / "cache"))[1]
    every = with_images(here, tmp_path, ROWS)
    with pytest.raises(KdcliError, match=r"are skipped: .*images_unread.*a teacher that reads images"):
        capture(request_of(here, tmp_path / "none", data=str(every)))
    assert not (tmp_path / "none").exists()


def test_a_student_of_text_leaves_rows_with_images_out(
    here: Path, tiny_cache: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """A cache of images and text serves a student of text by its rows without images; a method by vision tokens is refused."""
    said: list[str] = []
    made = train(str(tiny_cache), "kd", settings_of(here / "student", tmp_path / "run"), say=said.append)
    assert made["stages"][0]["steps"] == 2 and any("is text-only" in line for line in said)


def test_a_student_of_images_learns_from_a_teacher_of_text(cache: Path, tiny_student: Path, tmp_path: Path) -> None:
    made = train(str(cache), "kd", settings_of(tiny_student, tmp_path / "run"), "DFT")
    assert (Path(made["model"]) / "processor_config.json").is_file()


def test_the_null_teacher_of_a_folder_of_text(here: Path, tmp_path: Path) -> None:
    said = capture(request_of(here, tmp_path / "cache", f"null:{here / 'teacher'}", store="standard"))
    assert set(said["columns"]) == {"samples", "fields/response_topk", "fields/response_hidden"}
    made = train(str(tmp_path / "cache"), "kd", settings_of(here / "student", tmp_path / "run"))
    assert made["stages"]


@pytest.mark.usefixtures("checked_here")
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_tied_or_not_is_saved_as_it_was(here: Path, tied: bool, tmp_path: Path) -> None:
    """And with padding rows beyond the tokenizer, on either side."""
    student = build_text_folder(tmp_path / "student", "qwen2", tied=tied)
    capture(request_of(here, tmp_path / "cache", str(student), shards=1))
    made = train(str(tmp_path / "cache"), "kd", settings_of(student, tmp_path / "run"))
    names = load_file(Path(made["model"]) / "model.safetensors").keys()
    assert ("lm_head.weight" in names) is not tied
    assert TeacherCache(str(tmp_path / "cache")).fields["response_hidden"]["teacher"]["head_width"] == 4160 + 7
    export(ExportRequest(tmp_path / "run", tmp_path / "exported", check=True))


class Killed(Exception):
    pass


def test_a_run_goes_on_from_its_checkpoint(here: Path, cache: Path, tmp_path: Path) -> None:
    whole, parts = (settings_of(here / "student", tmp_path / n, max_steps=5, save_steps=2) for n in ("whole", "parts"))
    train(str(cache), "kd", whole)

    def kill(stage: str, step: int, steps: int, result: Any) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        train(str(cache), "kd", parts, on_step=kill)
    steps: list[int] = []
    train(str(cache), "kd", parts, on_step=lambda stage, step, total, result: steps.append(step))
    assert steps and min(steps) > 1
    ours, theirs = (load_file(tmp_path / n / "01-DFT" / "model" / "model.safetensors") for n in ("parts", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.exhaustive  # two processes; test_processes.py has a student of images
def test_shards_of_a_student_make_the_steps_of_one_process(here: Path, cache: Path, tmp_path: Path, warm: Warm) -> None:
    """FSDP2."""
    alone = settings_of(here / "student", tmp_path / "alone", gradient_accumulation_steps=2)
    train(str(cache), "kd", alone)
    own = replace(alone.train, output_dir=str(tmp_path / "sharded"), gradient_accumulation_steps=1, fsdp=True)
    warm.together(2, command(cache, own, "DFT", "kd"), tmp_path)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / n / "01-DFT" / "metrics.jsonl").read_text().splitlines()]
        for n in ("sharded", "alone")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    ours, theirs = (load_file(tmp_path / n / "01-DFT" / "model" / "model.safetensors") for n in ("sharded", "alone"))
    assert ours.keys() == theirs.keys()


def test_eval_asks_text_and_counts_what_it_cannot_ask(here: Path, tmp_path: Path) -> None:
    mixed = with_images(here, tmp_path, 3)
    scores = json.loads(kdcli("eval", here / "student", "--data", mixed, "--max-new-tokens", 4, "--json"))
    assert scores["n"] == ROWS - 3 and scores["skipped"] == {"images_unread": 3} and scores["nll"] > 0
