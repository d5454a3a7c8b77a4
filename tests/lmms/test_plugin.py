"""kdcli inside lmms-eval: found by its entry point, asked on a local task without the hub, the same answers as `kdcli eval`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from click.testing import CliRunner

from cli import main
from pipelines.lmms.model import Kdcli

HERE = Path(__file__).parent

QUESTIONS = [
    ("what is it", 1),
    ("which colour has the circle on the left side", 1),
    ("how many", 0),
    ("which of the two is larger", 2),
    ("name the capital letter that stands at the end", 0),
]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: {kind}
doc_to_visual: !function local_task.visuals
doc_to_text: !function local_task.text
doc_to_target: {target}
metadata:
  version: 1.0
"""
ANSWERS = """
generation_kwargs:
  max_new_tokens: 32
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: false
"""
CHOICES = """
doc_to_choice: !function local_task.choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
import PIL.Image


def visuals(doc):
    return [PIL.Image.open(path).convert("RGB") for path in doc["images"]]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def choices(doc):
    return doc["choices"]
"""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/, heldout.json as `kdcli eval` reads it, and tasks/ as lmms-eval does; the expected answers are to be filled in."""
    folder = tmp_path_factory.mktemp("lmms")
    (folder / "images").mkdir()
    for number in range(2):
        image = PIL.Image.effect_noise((96, 96), 60 + 30 * number).convert("RGB")
        image.paste((200, 40 * number, 30), (10, 10, 50 + 8 * number, 60))
        image.save(folder / "images" / f"{number}.png")
    return folder


def write_rows(folder: Path, expected: list[str]) -> None:
    """The same rows in both forms."""
    rows, docs = [], []
    for (question, count), answer in zip(QUESTIONS, expected):
        names = [f"{number}.png" for number in range(count)]
        turns = [{"from": "human", "value": "<image>\n" * count + question}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(len(rows)), "conversations": turns, **({"image": names} if names else {})})
        paths = [str(folder / "images" / name) for name in names]
        choices = ["a circle", "three", "a red square on the left"]
        docs.append({"question": question, "images": paths, "answer": answer, "choices": choices, "right": 1})
    (folder / "heldout.json").write_text(json.dumps(rows))
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    (tasks / "rows.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tasks / "local_task.py").write_text(FUNCTIONS)
    for name, kind, target, rest in (
        ("kdcli_answers", "generate_until", "answer", ANSWERS),
        ("kdcli_choices", "multiple_choice", "right", CHOICES),
    ):
        head = TASK.format(name=name, rows=tasks / "rows.jsonl", kind=kind, target=target)
        (tasks / f"{name}.yaml").write_text(head + rest)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a process that may not ask the hub."""
    root = str(HERE.parents[1])
    offline = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")}
    path = {"PYTHONPATH": f"{HERE / 'shim'}{os.pathsep}{root}"}
    return {**os.environ, **offline, **path, "HF_HOME": str(tmp_path_factory.mktemp("hub")), "WANDB_MODE": "disabled"}


def answers_file(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kdcli_eval(student: Path, world: Path, *flags: str) -> dict[str, Any]:
    """The scores of `kdcli eval` on the world's rows, and ``"given"``, its answers."""
    told = world / "answers.jsonl"
    files = ["--data", str(world / "heldout.json"), "--image-root", str(world / "images"), "--answers", str(told)]
    result = CliRunner().invoke(main, ["eval", str(student), *files, "--device", "cpu", "--json", *flags])
    assert result.exit_code == 0, result.output
    return {**json.loads(result.stdout), "given": [one["given"].strip() for one in answers_file(told)]}


@pytest.fixture(scope="module")
def filled(world: Path, tiny_student: Path) -> Path:
    """The world, where three of five expected answers are the student's own."""
    write_rows(world, ["x"] * len(QUESTIONS))
    own = kdcli_eval(tiny_student, world)["given"]
    write_rows(world, [*own[:3], "certainly not", "nor this"])
    return world


def asked_in_process(student: Path, world: Path, task: str, **arguments: Any) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(world / "tasks"), include_defaults=False, model_name="kdcli")
    text = ",".join(f"{name}={value}" for name, value in {"pretrained": student, **arguments}.items())
    return simple_evaluate(
        model="kdcli", model_args=text, tasks=[task], task_manager=manager, batch_size=1, device="cpu", log_samples=True
    )


def given(result: dict[str, Any], task: str = "kdcli_answers") -> list[str]:
    samples = sorted(result["samples"][task], key=lambda one: one["doc_id"])
    return [one["filtered_resps"][0].strip() for one in samples]


def test_the_command_line_finds_the_model_and_gives_the_same_answers(
    filled: Path, tiny_student: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    ours = kdcli_eval(tiny_student, filled)
    arguments = f"pretrained={tiny_student},batch_size=3"
    command = ["-P", "-m", "lmms_eval", "--model", "kdcli", "--model_args", arguments, "--tasks", "kdcli_answers"]
    where = ["--include_path", str(filled / "tasks"), "--output_path", str(tmp_path / "out"), "--log_samples"]
    done = subprocess.run(
        [sys.executable, *command, *where, "--device", "cpu"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    written = list((tmp_path / "out").rglob("*results.json"))  # it may fail with status 0
    assert done.returncode == 0 and len(written) == 1, done.stdout + done.stderr
    told = json.loads(written[0].read_text())["results"]["kdcli_answers"]
    (samples,) = (tmp_path / "out").rglob("*samples_kdcli_answers.jsonl")
    answers = [one["filtered_resps"] for one in sorted(answers_file(samples), key=lambda one: one["doc_id"])]
    assert [one.strip() for one in answers] == ours["given"]
    assert told["exact_match,none"] == ours["exact_match"] == 3 / 5


@pytest.mark.parametrize("batch_size", [1, 2])
def test_compressed_answers_are_those_of_kdcli_eval(filled: Path, tiny_student: Path, batch_size: int) -> None:
    flags = ["--compress", "dart", "--keep", "3", "--compress-layer", "1"]
    ours = kdcli_eval(tiny_student, filled, *flags)
    few = {"compress": "dart", "keep": 3, "compress_layer": 1, "batch_size": batch_size}
    result = asked_in_process(tiny_student, filled, "kdcli_answers", **few)
    assert given(result) == ours["given"]
    assert result["results"]["kdcli_answers"]["exact_match,none"] == ours["exact_match"] < 3 / 5


def test_a_template_asks_in_its_own_words(filled: Path, tiny_student: Path) -> None:
    from teacher_cache.errors import KdcliError

    chat, v1 = (given(asked_in_process(tiny_student, filled, "kdcli_answers", template=one)) for one in ("chat", "v1"))
    assert chat == kdcli_eval(tiny_student, filled)["given"] != v1
    with pytest.raises(KdcliError, match="v2"):
        asked_in_process(tiny_student, filled, "kdcli_answers", template="v2")


def test_an_elastic_student_is_asked_at_its_other_counts(filled: Path, tiny_student: Path, tmp_path: Path) -> None:
    import torch

    from student_train.compressors import CompressorSpec
    from student_train.load_student import load_student, save_student

    torch.manual_seed(0)
    model, processor = load_student(str(tiny_student), "sdpa", compressor=CompressorSpec("mqt", 9))
    with torch.no_grad():  # fresh queries say nearly nothing: let the answers depend on them
        model.model.multi_modal_projector.out.weight.mul_(100)
    save_student(model, processor, tmp_path / "nine")
    ours = kdcli_eval(tmp_path / "nine", filled, "--vision-tokens", "4")
    result = asked_in_process(tmp_path / "nine", filled, "kdcli_answers", vision_tokens=4, batch_size=5)
    assert given(result) == ours["given"]


def test_choices_are_taken_by_the_nats_that_kdcli_eval_measures(filled: Path, tiny_student: Path) -> None:
    """Each choice as the expected answer of `kdcli eval`; the likeliest a token is taken."""
    choices = json.loads((filled / "tasks" / "rows.jsonl").read_text().splitlines()[0])["choices"]
    rows = json.loads((filled / "heldout.json").read_text())
    folder = filled / "choices"
    folder.mkdir(exist_ok=True)
    nats: list[list[float]] = [[] for _ in rows]
    data = ["--data", str(folder / "heldout.json"), "--image-root", str(filled / "images")]
    flags = [*data, "--device", "cpu", "--json"]
    for choice in choices:
        for row in rows:
            row["conversations"][1]["value"] = choice
        (folder / "heldout.json").write_text(json.dumps(rows))
        told = CliRunner().invoke(
            main,
            ["eval", str(tiny_student), *flags],
        )
        for own, one in zip(nats, json.loads(told.stdout)["answers"]):
            own.append(one["nats"] / one["tokens"])
    result = asked_in_process(tiny_student, filled, "kdcli_choices", batch_size=4)
    samples = sorted(result["samples"]["kdcli_choices"], key=lambda one: one["doc_id"])
    for own, sample in zip(nats, samples):
        losses = [float(loss) for loss, _ in sample["filtered_resps"]]
        assert losses == pytest.approx(own, rel=1e-4)
    right = sum(own.index(min(own)) == 1 for own in nats) / len(nats)
    assert result["results"]["kdcli_choices"]["acc,none"] == pytest.approx(right)


def test_a_question_that_cannot_be_asked_is_answered_with_nothing_and_counted(
    filled: Path, tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others of its batch are answered as ever."""
    student = Path(shutil.copytree(tiny_student, tmp_path / "student"))
    template = student / "chat_template.jinja"
    refusing = "{% for m in messages %}{% for p in m['content'] %}{% if 'circle' in (p['text'] or '') %}"
    refusing += "{{ raise_exception('no circles') }}{% endif %}{% endfor %}{% endfor %}"
    template.write_text(refusing + template.read_text())
    whole, partly = (
        given(asked_in_process(one, filled, "kdcli_answers", batch_size=5)) for one in (tiny_student, student)
    )
    (lost,) = [number for number, (question, _) in enumerate(QUESTIONS) if "circle" in question]
    assert partly == [*whole[:lost], "", *whole[lost + 1 :]] and all(whole)
    assert "1 of 5 questions cannot be asked and count as empty answers: 1 template_refused" in capsys.readouterr().err


def test_several_rounds_are_refused_by_name(tiny_student: Path) -> None:
    from teacher_cache.errors import KdcliError

    model = Kdcli.create_from_arg_string(f"pretrained={tiny_student},batch_size=2", {"batch_size": 1, "device": "cpu"})
    assert model.batch_size == 2
    with pytest.raises(KdcliError, match=r"tasks of several rounds .* are not supported"):
        model.generate_until_multi_round([])
