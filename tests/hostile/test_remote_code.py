"""Program code that a model folder brings runs only where ``--trust-remote-code`` was given; without it one line names the flag."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import cli
from pipelines.command_line.given import teacher_spec, train_settings
from teacher_cache.errors import KdcliError
from teacher_cache.teachers.transformers import TeacherSpec, load_processor, teacher_fingerprint

CODE = """
from pathlib import Path
from transformers import LlavaConfig, LlavaForConditionalGeneration

Path({mark!r}).write_text("the folder's code ran")

class OwnConfig(LlavaConfig):
    model_type = "own_llava"

class OwnModel(LlavaForConditionalGeneration):
    config_class = OwnConfig
"""
LOADS_A_MODEL = (
    "doctor",
    "plan",
    "preflight",
    "cache-teacher",
    "train-student",
    "eval",
    "fidelity",
    "cache add-field",
    "cache repair",
)


@pytest.fixture(params=["own kind", "stock kind"])
def strange_model(tiny_teacher: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """(folder whose ``auto_map`` names a module of its own, the file that this module writes when it runs).

    "stock kind": its configuration besides says that it is plain LLaVA, which transformers can load without the module.
    """
    folder, mark = tmp_path / "strange", tmp_path / "ran"
    shutil.copytree(tiny_teacher, folder)
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.OwnModel"}
    if request.param == "own kind":
        config |= {"model_type": "own_llava", "architectures": ["OwnModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, mark


@pytest.fixture(autouse=True)
def own_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers copies a folder's code before it runs it."""
    from transformers import dynamic_module_utils
    from transformers.utils import hub

    for module in (dynamic_module_utils, hub):
        if hasattr(module, "HF_MODULES_CACHE"):
            monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def run(arguments: list[str]) -> Any:
    return CliRunner().invoke(cli.main, arguments)


def is_stock(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text())["model_type"] == "llava"


def asks(folder: Path, world_json: Any, tiny_student: Path, out: Path) -> dict[str, list[str]]:
    """Commands that read the strange model, as teacher or as student."""
    data = ["--data", str(world_json.captions), "--image-root", str(world_json.images), "--template", "plain"]
    capture = [*data, "--shards", "1", "--fields", "response_topk", "--k", "4", "--out", str(out), "--device", "cpu"]
    questions = ["--data", str(world_json.heldout), "--image-root", str(world_json.images), "--device", "cpu"]
    return {
        "doctor": ["doctor", *data, "--teacher", str(folder)],
        "plan": ["plan", *data, "--teacher", str(folder), "--sample", "2", "--shards", "1"],
        "cache-teacher": ["cache-teacher", *capture, "--teacher", str(folder), "--calibration-rows", "4"],
        "eval": ["eval", str(folder), *questions, "--limit", "1"],
    }


@pytest.mark.parametrize("command", ["doctor", "plan", "cache-teacher", "eval"])
def test_nothing_of_the_folder_runs(
    strange_model: tuple[Path, Path], world_json: Any, tiny_student: Path, tmp_path: Path, command: str
) -> None:
    folder, mark = strange_model
    found = run(asks(folder, world_json, tiny_student, tmp_path / "out")[command])
    assert not mark.exists(), found.output
    if not is_stock(folder):
        last = found.output.strip().splitlines()[-1]
        assert found.exit_code == 1 and "strange" in last and "--trust-remote-code" in last, found.output


def test_with_the_flag_it_runs_and_is_recorded(
    strange_model: tuple[Path, Path], world_json: Any, tiny_student: Path, tmp_path: Path
) -> None:
    folder, mark = strange_model
    found = run([*asks(folder, world_json, tiny_student, tmp_path / "out")["plan"], "--trust-remote-code"])
    assert mark.exists() and found.exit_code == 0, found.output
    spec = TeacherSpec(str(folder), trust_remote_code=True)
    one = teacher_fingerprint(spec, *load_processor(spec))
    (folder / "own.py").write_text((folder / "own.py").read_text() + "# another line\n")
    other = teacher_fingerprint(spec, *load_processor(spec))
    assert len(one["remote_code"]) == 64 and one["remote_code"] != other["remote_code"]


def test_a_repair_runs_what_made_the_cache_with_the_flag_only(
    strange_model: tuple[Path, Path], world_json: Any, tiny_student: Path, tmp_path: Path
) -> None:
    folder, _ = strange_model
    made = run([*asks(folder, world_json, tiny_student, tmp_path / "out")["cache-teacher"], "--trust-remote-code"])
    assert made.exit_code == 0, made.output
    (tar,) = (tmp_path / "out" / "fields" / "response_topk" / "data").iterdir()
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1])
    repair = ["cache", "repair", str(tmp_path / "out"), "--teacher", str(folder), "--device", "cpu"]
    refused = run(repair)
    why = "made by another teacher" if is_stock(folder) else "--trust-remote-code"
    assert refused.exit_code == 1 and why in refused.output and tar.read_bytes() == whole[:-1], refused.output
    mended = run([*repair, "--trust-remote-code"])
    assert mended.exit_code == 0 and tar.read_bytes() == whole, mended.output


def test_a_stock_teacher_is_the_same_with_the_flag(tiny_teacher: Path) -> None:
    specs = [TeacherSpec(str(tiny_teacher), trust_remote_code=trusted) for trusted in (False, True)]
    one, other = (teacher_fingerprint(spec, *load_processor(spec)) for spec in specs)
    assert one == other and "remote_code" not in one


def test_every_command_that_loads_a_model_has_the_flag_and_it_is_off() -> None:
    from pipelines.judge.evaluation.run import evaluate_folder
    from pipelines.judge.fidelity import FidelityRequest
    from student_train.config import TrainSettings
    from student_train.load_student import load_student, open_student

    with_flag = set()
    context = click.Context(cli.main)

    def look(group: click.Group, before: str) -> None:
        for name in group.list_commands(context):
            command = group.commands[name]
            if isinstance(command, click.Group):
                look(command, f"{before}{name} ")
            for option in command.params:
                if "--trust-remote-code" in option.opts:
                    assert not option.default, name
                    with_flag.add(f"{before}{name}")

    look(cli.main, "")
    assert with_flag == set(LOADS_A_MODEL)
    for made in (TeacherSpec("x"), TrainSettings(), FidelityRequest("c", TeacherSpec("x"), "s")):
        assert made.trust_remote_code is False
    for function in (evaluate_folder, load_student, open_student):
        assert inspect.signature(function).parameters["trust_remote_code"].default is False


def test_trust_in_one_model_does_not_go_over_to_another() -> None:
    from student_train.config import TrainSettings

    known = TeacherSpec("mine", trust_remote_code=True)
    assert teacher_spec(None, known, None).trust_remote_code
    assert not teacher_spec("theirs", known, None).trust_remote_code
    assert teacher_spec("theirs", known, True).trust_remote_code
    train = TrainSettings(student="mine", trust_remote_code=True)
    assert train_settings(train, None, None).trust_remote_code
    assert train_settings(train, "mine", None).trust_remote_code
    assert not train_settings(train, "theirs", None).trust_remote_code


def test_training_a_strange_student(strange_model: tuple[Path, Path], tiny_cache: Path, tmp_path: Path) -> None:
    from pipelines.settings import Settings
    from pipelines.train.train_student import train
    from student_train.config import TrainSettings

    folder, mark = strange_model

    def one_step(trusted: bool) -> None:
        output = str(tmp_path / f"run-{trusted}")
        given = TrainSettings(str(folder), output, 1, max_steps=1, report_to="none", trust_remote_code=trusted)
        train(str(tiny_cache), "sft", Settings(train=given), stages="SFT")

    if is_stock(folder):  # transformers knows it without its code
        one_step(False)
    else:
        with pytest.raises(KdcliError, match="--trust-remote-code"):
            one_step(False)
    assert not mark.exists()
    one_step(True)
    assert mark.exists()
    assert json.loads((tmp_path / "run-True" / "run.json").read_text())["stages"][0]["settings"]["trust_remote_code"]
