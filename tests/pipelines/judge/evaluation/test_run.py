"""Exact match on held-out questions: the answers are the model's own greedy ones, whatever the batch; nothing is left uncounted."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from pipelines.judge.evaluation.metrics.exact_match import normalise
from pipelines.judge.evaluation.run import MAX_NEW_TOKENS, Answer, evaluate, evaluate_folder, score
from pipelines.judge.evaluation.score import calibration_error
from pipelines.terminal.tables import score_table
from student_train.pruning import Pruning
from teacher_cache.errors import CompatibilityError, DataError
from teacher_cache.sources import DataSpec
from tests.student_train.pruning.plain import pruned_states

QUESTIONS = [
    ("shape", "<image>\nwhat is it", 1),
    ("shape", "<image>\nwhich colour has the circle on the left side", 1),
    ("text", "how many", 0),
    ("text", "name the capital letter that stands at the end", 0),
    ("pair", "<image>\n<image>\nwhich of the two is larger", 2),
]


def picture(number: int) -> bytes:
    image = PIL.Image.effect_noise((96, 96), 60 + 30 * number).convert("RGB")
    image.paste((200, 40 * number, 30), (10, 10, 50 + 8 * number, 60))
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def student(tiny_student: Path) -> tuple[Any, Any]:
    from student_train.load_student import load_student

    return load_student(str(tiny_student), "sdpa")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
    return folder


@torch.inference_mode()
def greedy(student: tuple[Any, Any], prompt: str, pictures: list[PIL.Image.Image]) -> str:
    """One question, one token at a time, the whole sequence anew for each: no batch, no padding, no cache, no ``generate``."""
    model, processor = student
    inputs = processor(text=[prompt], images=pictures or None, return_tensors="pt")
    ids, said = inputs.pop("input_ids"), []
    inputs.pop("attention_mask")
    for _ in range(MAX_NEW_TOKENS):
        token = int(model.eval()(input_ids=ids, **inputs).logits[0, -1].argmax())
        if token == processor.tokenizer.eos_token_id:
            break
        said.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return processor.tokenizer.decode(said, skip_special_tokens=True)


@pytest.fixture(scope="module")
def own_answers(student: tuple[Any, Any], images: Path) -> list[str]:
    opened = [PIL.Image.open(images / f"{number}.png").convert("RGB") for number in range(3)]
    return [greedy(student, f"<|user|>{text}<|end|><|assistant|>", opened[:count]) for _, text, count in QUESTIONS]


@torch.inference_mode()
def answer_tokens(student: tuple[Any, Any], prompt: str, answer: str, pictures: list[PIL.Image.Image]) -> list[float]:
    """Nats of each token of ``answer`` and its end of turn."""
    log_probs, ids = answer_rows(student, prompt, answer, pictures)
    return [float(-row[token]) for row, token in zip(log_probs, ids)]


def answer_rows(
    student: tuple[Any, Any], prompt: str, answer: str, pictures: list[PIL.Image.Image]
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 log-probs before each token of the answer, and these tokens: one forward over the whole text, no batch, no label mask."""
    model, processor = student
    whole, asked = (
        processor(text=[t], images=pictures or None, return_tensors="pt") for t in (f"{prompt}{answer}<|end|>", prompt)
    )
    ids = whole.pop("input_ids")
    whole.pop("attention_mask")
    with torch.inference_mode():
        log_probs = model.eval()(input_ids=ids, **whole).logits[0].double().log_softmax(-1)
    first = asked["input_ids"].shape[1]
    return log_probs[first - 1 : -1], ids[0, first:]


def write(folder: Path, rows: list[dict[str, Any]], images: Path) -> DataSpec:
    (folder / "heldout.json").write_text(json.dumps(rows))
    return DataSpec("heldout", str(folder / "heldout.json"), image_root=str(images))


def row(family: str, text: str, count: int, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    pictures = [f"{number}.png" for number in range(count)]
    image = {"image": pictures if count > 1 else pictures[0]} if count else {}
    return {"id": "0", "family": family, "conversations": turns, **image}


def test_greedy_answers_score_exactly(
    student: tuple[Any, Any], own_answers: list[str], images: Path, tmp_path: Path
) -> None:
    """Two of the expected answers are not the model's: 3 of 5, 2 of 2 shapes, 1 of 2 texts, 0 of 1 pair."""
    assert all(answer.strip() for answer in own_answers), "the random student says something everywhere"
    expected = list(own_answers)
    expected[3], expected[4] = "certainly not this", "nor this"
    rows = [row(*question, answer) for question, answer in zip(QUESTIONS, expected)]
    result = evaluate(*student, write(tmp_path, rows, images))
    assert [one.given for one in result["answers"]] == own_answers
    assert result["n"] == 5 and result["exact_match"] == 3 / 5
    assert {name: (one["n"], one["exact_match"]) for name, one in result["families"].items()} == {
        "pair": (1, 0.0),
        "shape": (2, 1.0),
        "text": (2, 0.5),
    }
    assert result["family_mean"] == pytest.approx(0.5) and result["skipped"] == {}


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batch_size_has_no_effect(
    student: tuple[Any, Any], own_answers: list[str], images: Path, tmp_path: Path, batch_size: int
) -> None:
    """Left padding and other rows' pictures stay out of an answer; progress counts every question."""
    rows = [row(*question, "x") for question in QUESTIONS]
    told: list[int] = []
    result = evaluate(*student, write(tmp_path, rows, images), batch_size, told.append)
    assert [one.given for one in result["answers"]] == own_answers
    assert sum(told) == 5 and max(told) <= batch_size


def test_earlier_turns_are_context_and_the_last_is_asked(
    student: tuple[Any, Any], images: Path, tmp_path: Path
) -> None:
    first = row("talk", "<image>\nwhat is it", 1, "a circle")
    first["conversations"] += [{"from": "human", "value": "how many"}, {"from": "gpt", "value": "three"}]
    result = evaluate(*student, write(tmp_path, [first], images))
    prompt = "<|user|><image>\nwhat is it<|end|><|assistant|>a circle<|end|><|user|>how many<|end|><|assistant|>"
    opened = [PIL.Image.open(images / "0.png").convert("RGB")]
    (answer,) = result["answers"]
    assert (answer.question, answer.expected) == ("how many", "three")
    assert answer.given == greedy(student, prompt, opened)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_nll_is_that_of_the_expected_answers(
    student: tuple[Any, Any], images: Path, tmp_path: Path, batch_size: int
) -> None:
    """Families of unequal token counts: over the tokens of each, then the mean of families; the end of turn is a token of the answer."""
    answers = ["a red circle on the left side", "blue", "three", "m", "the second of the two"]
    rows = [row(*question, answer) for question, answer in zip(QUESTIONS, answers)]
    result = evaluate(*student, write(tmp_path, rows, images), batch_size)
    opened = [PIL.Image.open(images / f"{number}.png").convert("RGB") for number in range(3)]
    nats: dict[str, list[float]] = {}
    for (family, text, count), answer, one in zip(QUESTIONS, answers, result["answers"]):
        own = answer_tokens(student, f"<|user|>{text}<|end|><|assistant|>", answer, opened[:count])
        assert one.tokens == len(own) and one.nats == pytest.approx(sum(own), rel=1e-5)
        nats.setdefault(family, []).extend(own)
    means = {family: sum(own) / len(own) for family, own in nats.items()}
    assert {name: one["nll"] for name, one in result["families"].items()} == pytest.approx(means, rel=1e-5)
    assert result["nll_family_mean"] == pytest.approx(sum(means.values()) / 3, rel=1e-5)
    every = [value for own in nats.values() for value in own]
    assert result["nll"] == pytest.approx(sum(every) / len(every), rel=1e-5)


def test_nll_is_of_the_last_answer_and_skips_what_training_cannot_render(
    student: tuple[Any, Any], images: Path, tmp_path: Path
) -> None:
    talk = row("talk", "<image>\nwhat is it", 1, "a circle")
    talk["conversations"] += [{"from": "human", "value": "how many"}, {"from": "gpt", "value": "three"}]
    reserved = row("odd", "say <|end|>", 0, "three")
    result = evaluate(*student, write(tmp_path, [reserved, talk], images))
    prompt = "<|user|><image>\nwhat is it<|end|><|assistant|>a circle<|end|><|user|>how many<|end|><|assistant|>"
    own = answer_tokens(student, prompt, "three", [PIL.Image.open(images / "0.png").convert("RGB")])
    odd, last = result["answers"]
    log_probs, ids = answer_rows(student, prompt, "three", [PIL.Image.open(images / "0.png").convert("RGB")])
    tops = [(float(one.max().exp()), bool(one.argmax() == token)) for one, token in zip(log_probs, ids)]
    assert [one[1] for one in last.tops] == [one[1] for one in tops] and not odd.tops
    assert [one[0] for one in last.tops] == pytest.approx([one[0] for one in tops], rel=1e-5)
    assert result["ece"] == pytest.approx(calibration_error(tops), rel=1e-5)
    assert (odd.tokens, last.tokens) == (0, len(own)) and last.nats == pytest.approx(sum(own), rel=1e-5)
    assert result["families"]["odd"]["nll"] is None and result["nll_skipped"] == {"reserved_token": 1}
    assert "nll without 1 of them: 1 reserved_token" in score_table({"student": result})
    assert result["nll_family_mean"] == result["nll"] == pytest.approx(sum(own) / len(own), rel=1e-5)


def test_rows_that_cannot_be_scored_are_counted_by_reason(
    student: tuple[Any, Any], images: Path, tmp_path: Path
) -> None:
    good = row("text", "how many", 0, "three")
    lost = {**row("shape", "<image>\nwhat", 1, "x"), "image": "absent.png"}
    mismatch = row("shape", "<image>\n<image>\nwhat", 1, "x")
    empty = row("text", "how many", 0, " ")
    open_end = row("text", "how many", 0, "three")
    open_end["conversations"].append({"from": "human", "value": "and now"})
    result = evaluate(*student, write(tmp_path, [good, lost, mismatch, empty, open_end], images))
    assert result["n"] == 1
    assert result["skipped"] == {"image_missing": 1, "placeholder_mismatch": 1, "empty_answer": 1, "no_answer": 1}
    assert result["rows"] == result["n"] + sum(result["skipped"].values()) == result["n"] + len(result["skips"])
    assert {"place": "heldout.json row 1", "reason": "image_missing"}.items() <= result["skips"][0].items()
    last = score_table({"student": result}).splitlines()[-1]
    assert last.startswith("1 of 5 rows asked, 4 skipped: 1 ") and "1 image_missing" in last
    with pytest.raises(
        DataError,
        match=r"no row can be scored \(1 image_missing; the first, heldout.json row 0: \'absent.png\' does not exist",
    ):
        evaluate(*student, write(tmp_path, [lost], images))


def test_where_nothing_can_be_asked_the_command_fails_before_the_weights(
    tiny_student: Path, images: Path, tmp_path: Path
) -> None:
    import shutil

    from click.testing import CliRunner

    from cli import main

    bare = Path(shutil.copytree(tiny_student, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))
    for rows, said in (([row("shape", "<image>\nwhat", 2, "x")] * 3, "3 placeholder_mismatch"), ([], "it is empty")):
        spec = write(tmp_path, rows, images)
        flags = ["--image-root", str(images), "--json"]
        result = CliRunner().invoke(main, ["eval", str(bare), "--data", spec.path, *flags])
        assert result.exit_code == 1 and result.stdout == ""
        assert (
            result.stderr.startswith(f"Error: {spec.path}: no row can be scored ({said}")
            and result.stderr.count("\n") == 1
        )


def test_a_run_stands_for_its_last_stage(tiny_student: Path, images: Path, tmp_path: Path) -> None:
    import shutil

    from click.testing import CliRunner

    from cli import main

    run = tmp_path / "runs" / "mine"
    shutil.copytree(tiny_student, run / "01-SFT" / "model")
    (run / "run.json").write_text('{"stages": [{"stage": "SFT"}]}')
    (run / "01-SFT" / "done.json").write_text('{"identity": {}, "result": {}}')
    command = ["--data", write(tmp_path, [row("text", "how many", 0, "three")], images).path, "--device", "cpu"]
    result = CliRunner().invoke(main, ["eval", str(run), *command])
    assert result.exit_code == 0 and "01-SFT/model | questions |" in result.stdout and "note" not in result.stderr
    result = CliRunner().invoke(main, ["eval", str(run.parent), *command])
    assert result.exit_code == 1 and f"nor a run (run.json): the runs in it are {run}" in result.stderr


def test_the_command_shows_what_was_not_asked(tiny_student: Path, images: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from cli import main

    spec = write(tmp_path, [row("text", "how many", 0, "three"), row("shape", "<image>\nwhat", 2, "x")], images)
    flags = ["--image-root", str(images), "--device", "cpu", "--out", str(tmp_path / "scores.json")]
    shown = CliRunner().invoke(main, ["eval", str(tiny_student), "--data", spec.path, *flags])
    assert shown.stdout.endswith("\n\n1 of 2 rows asked, 1 skipped: 1 placeholder_mismatch\n")
    (said,) = [line for line in shown.stderr.splitlines() if line.startswith("note: ")]
    assert said.startswith(
        "note: 1 of 2 rows were not asked, the scores cover the other 1; the first, heldout.json row 1:"
    )
    assert said.endswith("2 images")
    body = json.loads(
        CliRunner().invoke(main, ["eval", str(tiny_student), "--data", spec.path, *flags, "--json"]).stdout
    )
    assert (body["rows"], body["n"], body["skipped"]) == (2, 1, {"placeholder_mismatch": 1})
    assert [one["place"] for one in body["skips"]] == ["heldout.json row 1"] and "2 images" in body["skips"][0][
        "detail"
    ]
    (kept,) = json.loads((tmp_path / "scores.json").read_text()).values()
    assert kept["skipped"] == {"placeholder_mismatch": 1} and not {"skips", "answers"} & kept.keys()


def test_a_question_that_the_processor_refuses_is_counted_and_the_others_are_answered(
    student: tuple[Any, Any], own_answers: list[str], images: Path, tmp_path: Path
) -> None:
    class Moody(type(student[1])):
        def __call__(self, images: Any = None, text: Any = None, **given: Any) -> Any:
            if any("narrow" in one for one in text):
                raise ZeroDivisionError("integer division or modulo by zero")
            return super().__call__(images=images, text=text, **given)

    processor = copy.copy(student[1])
    processor.__class__ = Moody
    rows = [row(*question, answer) for question, answer in zip(QUESTIONS, own_answers)]
    rows.insert(1, row("shape", "<image>\nnarrow?", 1, "yes"))
    result = evaluate(student[0], processor, write(tmp_path, rows, images))
    assert result["skipped"] == {"processor_refused": 1}
    assert result["n"] == len(QUESTIONS) and result["exact_match"] == 1.0 and result["nll"] > 0


def test_the_image_limit_is_the_one_given(student: tuple[Any, Any], images: Path, tmp_path: Path) -> None:
    spec = write(tmp_path, [row("shape", "<image>\nwhat", 1, "x"), row("text", "how many", 0, "x")], images)
    from dataclasses import replace

    result = evaluate(*student, replace(spec, max_image_pixels=96 * 96 - 1))
    assert result["n"] == 1 and result["skipped"] == {"image_too_large": 1}


def test_a_folder_is_scored_as_its_model(
    tiny_student: Path, own_answers: list[str], images: Path, tmp_path: Path
) -> None:
    spec = write(tmp_path, [row(*question, answer) for question, answer in zip(QUESTIONS, own_answers)], images)
    assert evaluate_folder(str(tiny_student), spec, device="cpu")["exact_match"] == 1.0


@pytest.mark.parametrize("given", ["Yes", " yes.", "YES ", "yes. "])
def test_case_space_and_full_stop_do_not_count(given: str) -> None:
    assert normalise(given) == "yes" and Answer("f", "q", "Yes.", given).correct
    assert not Answer("f", "q", "yes it is", given).correct


def test_families_count_the_same_however_many_rows_they_have() -> None:
    answers = [Answer("many", "q", "a", "a")] * 9 + [Answer("one", "q", "a", "b")]
    result = score(answers)
    assert result["exact_match"] == 0.9 and result["family_mean"] == 0.5


@pytest.mark.parametrize("operator", ["dart", "fastv", "pyramiddrop", "random"])
def test_compressed_answers(
    student: tuple[Any, Any], tiny_student: Path, own_answers: list[str], images: Path, tmp_path: Path, operator: str
) -> None:
    """Any batch size gives the same answers; all tokens kept are the model's own; few kept change some; text rows never change."""
    spec = write(tmp_path, [row(*question, "x") for question in QUESTIONS], images)
    whole = evaluate_folder(str(tiny_student), spec, 5, "cpu", compress=operator, keep=36, compress_layer=1)
    assert [one.given for one in whole["answers"]] == own_answers
    few = Pruning(operator, layer=1, keep=3)
    results = [evaluate(*student, spec, size, pruning=few) for size in (1, 2, 5)]
    given = [[one.given for one in result["answers"]] for result in results]
    assert given[0] == given[1] == given[2]
    assert given[0][2:4] == own_answers[2:4] and given[0] != own_answers
    assert results[0]["compression"] == {"operator": operator, "layer": 1, "removed": None, "keep": 3}
    assert "compression" not in evaluate(*student, spec, 5)


def test_compressed_answers_are_those_of_the_plain_forward(
    student: tuple[Any, Any], tiny_student: Path, images: Path, tmp_path: Path
) -> None:
    """The question with two pictures: 3 tokens each, ranked together, chosen by the prompt, then one token at a time."""
    from student_train.load_student import load_student

    model, processor = load_student(str(tiny_student), "eager")
    _, text, count = QUESTIONS[4]
    opened = [PIL.Image.open(images / f"{number}.png").convert("RGB") for number in range(count)]
    inputs = processor(text=[f"<|user|>{text}<|end|><|assistant|>"], images=opened, return_tensors="pt")
    ids, said, pixels = inputs["input_ids"][0], [], {"pixel_values": inputs["pixel_values"]}
    pruning, asking = Pruning("dart", layer=1, keep=3), len(ids) - 1
    with torch.inference_mode():
        for _ in range(MAX_NEW_TOKENS):
            states, rows = pruned_states(model, ids, pixels, pruning, asking, count)
            token = int(model.lm_head(states[-1]).argmax())
            if token == processor.tokenizer.eos_token_id:
                break
            said.append(token)
            ids = torch.cat([ids, torch.tensor([token])])
    assert len(ids) - len(rows) >= 72 - 6
    result = evaluate(*student, write(tmp_path, [row(*QUESTIONS[4], "x")], images), pruning=pruning)
    assert result["answers"][0].given == processor.tokenizer.decode(said, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--compress", "fastvv", "--keep", "4"],
            "unknown compression operator 'fastvv': choose from dart, fastv, pyramiddrop, random",
        ),
        (["--compress", "dart"], "give the number of vision tokens to keep"),
        (["--compress", "dart", "--keep", "0"], "at least 1 vision token"),
        (
            ["--compress", "dart", "--keep", "4", "--compress-layer", "3"],
            "layer 3 is outside the model, whose layers are 0 to 1",
        ),
        (["--keep", "4"], "keep and compress-layer need compress: choose from dart"),
        (["--vision-tokens", "4"], "has no compressor, which vision_tokens 4 needs"),
    ],
)
def test_wrong_compression_is_refused_before_the_weights(
    tiny_student: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    """The folder has no weights at all."""
    import shutil

    from click.testing import CliRunner

    from cli import main

    bare = Path(shutil.copytree(tiny_student, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))
    result = CliRunner().invoke(main, ["eval", str(bare), "--data", "absent.json", *flags])
    assert result.exit_code == 1 and message in " ".join(result.output.split())


def test_an_elastic_student_answers_with_as_many_tokens_as_asked(
    tiny_student: Path, images: Path, tmp_path: Path
) -> None:
    from student_train.compressors import CompressorSpec
    from student_train.load_student import load_student, save_student

    torch.manual_seed(0)
    model, processor = load_student(str(tiny_student), "sdpa", compressor=CompressorSpec("mqt", 9))
    with torch.no_grad():  # fresh queries say nearly nothing: let the answers depend on them
        model.model.multi_modal_projector.out.weight.mul_(100)
    save_student(model, processor, tmp_path / "nine")
    spec = write(tmp_path, [row(*question, "x") for question in QUESTIONS], images)
    few, _ = load_student(str(tmp_path / "nine"), "sdpa", compressor=CompressorSpec("", 4))
    assert few.model.multi_modal_projector.keep == 4
    trained = evaluate_folder(str(tmp_path / "nine"), spec, device="cpu")
    asked = [evaluate_folder(str(tmp_path / "nine"), spec, device="cpu", vision_tokens=count) for count in (9, 4)]
    assert asked[0]["nll"] == trained["nll"] != asked[1]["nll"]
    with pytest.raises(CompatibilityError, match="vision tokens of a 6×6 grid: choose --vision-tokens from 1 to 35"):
        evaluate_folder(str(tmp_path / "nine"), spec, device="cpu", vision_tokens=99)


def test_the_command_says_what_was_compressed(tiny_student: Path, images: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from cli import main

    spec = write(tmp_path, [row(*QUESTIONS[0], "x")], images)
    flags = [
        "--image-root",
        str(images),
        "--compress",
        "fastv",
        "--keep",
        "5",
        "--compress-layer",
        "1",
        "--device",
        "cpu",
        "--json",
    ]
    result = CliRunner().invoke(main, ["eval", str(tiny_student), "--data", spec.path, *flags])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["compression"] == {"operator": "fastv", "layer": 1, "removed": None, "keep": 5}
