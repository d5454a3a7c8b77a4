"""What is asked and held against: the column ``answers``, suffixes, lengths, stop texts; what the command writes."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from pipelines.ablate.cell import ask
from pipelines.export.provenance import trained_template
from pipelines.judge.evaluation.answers import Prompt, answer, until
from pipelines.judge.evaluation.run import evaluate, evaluate_folder
from pipelines.judge.evaluation.score import Answer, score
from pipelines.lmms.requests import model_arguments
from pipelines.terminal.tables import score_table
from teacher_cache.errors import KdcliError
from teacher_cache.records import Turn
from teacher_cache.sources import DataSpec
from tests.conftest import ending_as_vicuna


@pytest.fixture(scope="module")
def student(tiny_student: Path) -> tuple[Any, Any]:
    from student_train.load_student import load_student

    return load_student(str(tiny_student), "sdpa")


def write(folder: Path, *rows: dict[str, Any]) -> DataSpec:
    (folder / "heldout.json").write_text(json.dumps(rows))
    return DataSpec("heldout", str(folder / "heldout.json"))


def row(text: str, answer: str | None, **columns: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": text}]
    turns += [] if answer is None else [{"from": "gpt", "value": answer}]
    return {"id": "0", "conversations": turns, **columns}


def said(student: tuple[Any, Any], text: str, *more: Any, **named: Any) -> str:
    return answer(*student, [Prompt((Turn("user", text),))], *more, **named)[0]


def test_references_are_the_column_or_the_last_turn(student: tuple[Any, Any], tmp_path: Path) -> None:
    own = said(student, "how many")
    rows = [
        row("how many", "certainly not", answers=["nor this", own], family="listed"),
        row("how many", None, answers=[{"answer": own, "answer_confidence": "yes"}, {"answer": "7"}], family="vqa"),
        row("how many", "certainly not", answers=7, family="number"),
        row("how many", own, answers=[["nested"]], family="odd"),
        row("how many", None, family="open"),
    ]
    result = evaluate(*student, write(tmp_path, *rows), metrics=("vqa_accuracy", "anls", "pope"))
    listed, vqa, number, odd = result["answers"]
    assert listed.references == ("nor this", own) and listed.expected == "certainly not" and listed.correct
    assert vqa.references == (own, "7") and vqa.expected == own and vqa.correct and vqa.tokens > 0
    assert number.references == ("7",) and not number.correct
    assert odd.references == (own,) and odd.correct
    assert result["skipped"] == {"no_answer": 1} and result["references"] == {1: 2, 2: 2}
    assert {name: one["vqa_accuracy"] for name, one in result["families"].items()} == {
        "listed": 0.5, "vqa": 0.5, "number": 0.0, "odd": 1.0,
    }  # fmt: skip
    assert result["vqa_accuracy"] == result["vqa_accuracy_family_mean"] == 0.5 and result["anls"] >= 0.75
    assert not any("pope" in key for key in result), "no yes-no question, no column"


def test_a_suffix_is_part_of_the_question(student: tuple[Any, Any], tmp_path: Path) -> None:
    spec = write(tmp_path, row("how many", "three"))
    asked = evaluate(*student, spec, prompt_suffix="one word")
    same = evaluate(*student, write(tmp_path, row("how many\none word", "three")))
    bare = evaluate(*student, write(tmp_path, row("how many", "three")))
    assert asked["answers"] == same["answers"] and asked["nll"] == same["nll"] != bare["nll"]


def test_an_answer_has_so_many_tokens_at_most(student: tuple[Any, Any], tmp_path: Path) -> None:
    long, short = said(student, "how many"), said(student, "how many", 3)
    assert long.startswith(short) and len(short) < len(long)
    result = evaluate(*student, write(tmp_path, row("how many", "x")), max_new_tokens=3)
    assert result["answers"][0].given == short
    with pytest.raises(KdcliError, match="max_new_tokens must be at least 1"):
        evaluate(*student, write(tmp_path, row("how many", "x")), max_new_tokens=0)


def test_stop_texts_end_an_answer_and_the_work(student: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two questions in a batch, each ends before its own first stop text; no token is made once both have."""
    questions = ["how many", "name the capital letter"]
    whole = [said(student, text, 24) for text in questions]
    stop = [text[6:8] for text in whole]
    steps: list[int] = []
    model = student[0]
    handle = model.register_forward_hook(lambda *_: steps.append(1))
    try:
        prompts = [Prompt((Turn("user", text),)) for text in questions]
        cut = answer(*student, prompts, 24, stop=stop)
    finally:
        handle.remove()
    assert cut == [until(text, stop) for text in whole]
    assert all(len(text) <= 6 for text in cut) and len(steps) < 24


def test_a_narrow_model_answers_and_forces(tiny_student: Path) -> None:
    """bfloat16, as lmms-eval's users load it on a GPU: nats near those of float32, of a row with a picture too."""
    from pipelines.judge.evaluation.answers import expected
    from pipelines.judge.evaluation.run import load_answering
    from pipelines.lmms.requests import prompt
    from pipelines.lmms.requests import row as forced
    from student_train.student import RowForward
    from teacher_cache.preparing.prepare import Limits, Preparer

    asked = prompt("what is it", [PIL.Image.effect_noise((96, 96), 60).convert("RGB")], "any")
    nats = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, processor = load_answering(str(tiny_student), device="cpu", dtype=dtype)
        assert answer(model.eval(), processor, [asked], 2) != [""]
        preparer = Preparer(processor, model.config, Limits(max_length=1 << 60))
        (one,) = expected(RowForward(model), preparer, [forced(asked, "a circle")], DataSpec("x", "x"))
        nats[dtype] = one.nats
    assert nats[torch.bfloat16].tolist() == pytest.approx(nats[torch.float32].tolist(), rel=0.2)
    assert nats[torch.bfloat16].tolist() != nats[torch.float32].tolist()


def test_until_takes_the_first() -> None:
    assert until("one two three", ["three", "two", "x"]) == "one " and until("one", []) == "one"


def test_metrics_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(KdcliError, match="unknown metric 'bleu': choose from anls"):
        evaluate_folder("absent", DataSpec("heldout", "absent.json"), metrics=("anls", "bleu"))
    with pytest.raises(KdcliError, match=r'metrics must be a list of names, e.g. \["anls"\]'):
        evaluate_folder("absent", DataSpec("heldout", "absent.json"), metrics="anls")


def test_tables_show_what_was_asked() -> None:
    answers = [Answer("seen", "q", "yes", "yes"), Answer("seen", "q", "no", "yes"), Answer("name", "q", "ab", "abc")]
    plain = score_table({"model": score(answers)})
    assert "pope" not in plain and "anls" not in plain
    lines = [line.split("|")[1:3] for line in score_table({"model": score(answers, ("pope", "anls"))}).splitlines()]
    shown = {name.strip(): value.strip() for name, value in lines}
    assert shown["seen"] == "50.0" and shown["all questions"] == "33.3"
    assert shown["pope_f1, seen"] == shown["pope_f1, all questions"] == "66.7" and "pope_f1, name" not in shown
    assert shown["anls, name"] == "66.7" and shown["anls, mean of families"] == "58.3"


def test_a_table_counts_questions_of_every_family_and_model() -> None:
    both = [Answer("seen", "q", "yes", "yes"), Answer("seen", "q", "no", "yes"), Answer("name", "q", "ab", "abc")]
    whole, part = score(both), {**score(both[:2]), "skipped": {"no_answer": 1}}
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in score_table({"a": whole, "b": part}).splitlines()
    ]
    asked = {line[0]: line[-1] for line in lines if line}
    assert (asked["seen"], asked["name"], asked["all questions"]) == ("2", "1 / –", "3 / 2")
    assert score_table({"a": whole, "b": part}).splitlines()[-1] == "b: 2 of 3 rows asked, 1 skipped: 1 no_answer"
    assert "asked" not in score_table({"a": whole}) and not score_table({"a": whole}).endswith("\n")


def test_the_command_writes_scores_and_answers(tiny_student: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from cli import main

    image = io.BytesIO()
    PIL.Image.effect_noise((96, 96), 60).convert("RGB").save(image, "png")
    (tmp_path / "0.png").write_bytes(image.getvalue())
    spec = write(tmp_path, row("<image>\nis it red", "no", image="0.png", family="seen"), row("how many", "3"))
    flags = ["--device", "cpu", "--metric", "pope, vqa_accuracy", "--max-new-tokens", "4"]
    files = ["--out", str(tmp_path / "scores.json"), "--answers", str(tmp_path / "answers.jsonl")]
    result = CliRunner().invoke(main, ["eval", str(tiny_student), "--data", spec.path, *flags, *files, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert lines == told.pop("answers") and [line["family"] for line in lines] == ["seen", "heldout"]
    assert lines[0]["references"] == ["no"] and set(lines[0]["scores"]) == {"pope", "vqa_accuracy"}
    assert lines[1]["scores"]["pope"] is None and told["pope_yes_ratio"] in (0, 1)
    assert told.pop("skips") == []
    assert json.loads((tmp_path / "scores.json").read_text()) == {str(tiny_student): told}


@pytest.fixture
def trained_with(tiny_student: Path, tmp_path: Path) -> Callable[..., Path]:
    """``trained_with(sft="v1")``: a stage's model in a run whose parts had these templates."""

    def make(**templates: str) -> Path:
        run = tmp_path / "-".join(["run", *templates.values()])
        model = ending_as_vicuna(tiny_student, run / "01-DFT" / "model")
        (run / "run.json").write_text(json.dumps({"stages": [{"stage": "DFT", "templates": templates}]}))
        return model

    return make


def asked_as(model: Path, data: str, *flags: str) -> list[str]:
    from click.testing import CliRunner

    from cli import main

    result = CliRunner().invoke(main, ["eval", str(model), "--data", data, "--device", "cpu", "--json", *flags])
    assert result.exit_code == 0, result.output
    return [one["given"] for one in json.loads(result.stdout)["answers"]]


def test_a_model_is_asked_in_the_template_it_was_trained_with(trained_with, tiny_student: Path, tmp_path: Path) -> None:
    """That of its run; ``--template`` says otherwise; who stands alone, or wrote captions alone, is asked as its chat template asks."""
    data = write(tmp_path, row("how many", "3"), row("what is it", "a circle")).path
    model = trained_with(sft="v1", caption="plain")
    chat, v1 = (asked_as(model, data, "--template", one) for one in ("chat", "v1"))
    assert asked_as(model, data) == v1 != chat
    assert model_arguments({"pretrained": str(model)}).asking_template() == "v1"
    assert model_arguments({"pretrained": str(model), "template": "chat"}).asking_template() == "chat"
    of_a_grid = {"file": {"name": "heldout", "path": data}, "options": {"device": "cpu"}}
    assert ask(model, of_a_grid, False)["nll"] == evaluate_folder(str(model), DataSpec("x", data, template="v1"))["nll"]
    alone = Path(shutil.copytree(model, tmp_path / "alone"))
    assert asked_as(alone, data) == chat == asked_as(trained_with(caption="plain"), data)
    assert model_arguments({"pretrained": str(tiny_student)}).asking_template() == "chat"


def test_an_export_says_how_its_model_is_asked(trained_with, tmp_path: Path) -> None:
    from pipelines.export.run import known_template, template_notes

    assert known_template(trained_with(sft="v1")) == "v1" and "--template v1" in template_notes("v1")[0]
    assert (
        known_template(trained_with(sft="v1", more="chat")) is None
        and template_notes(None) == template_notes("chat") == []
    )


def test_several_templates_have_to_be_chosen_from(trained_with) -> None:
    with pytest.raises(KdcliError, match=r"trained with the templates chat and v1: choose one with --template"):
        trained_template(str(trained_with(sft="v1", more="chat", caption="plain")))


def test_the_folder_of_task_groups_is_printed() -> None:
    from click.testing import CliRunner

    from cli import main

    folder = Path(CliRunner().invoke(main, ["eval-tasks"]).stdout.strip())
    assert sorted(path.stem for path in folder.glob("*.yaml")) == ["em_kd_11", "epic_10", "llava_kd_10", "quick"]
