"""Other people's chat templates under every command: rows that a template refuses are skipped and counted, a broken one is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from transformers import LlavaConfig

from cli import main
from pipelines.judge.evaluation.answers import Prompt, answer, answers_or_skips, prompt_of
from pipelines.lmms.requests import prompt as lmms_prompt
from teacher_cache.errors import SkipSample
from teacher_cache.preparing.chat import Chat
from teacher_cache.records import Sample, Turn
from tests.teacher_cache.preparing.test_chat import (
    BOTH,
    ENDLESS,
    FIRST,
    PROMPT,
    STRING,
    around,
    each,
    llama_like,
    transformers_own,
)

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + each(BOTH)
TEXTS = each("{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows with a picture, one of them with a system turn."""
    folder = tmp_path_factory.mktemp("rows")
    PIL.Image.new("RGB", (96, 96), "red").save(folder / "red.png")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    made = [{"id": str(number), "image": "red.png", "conversations": talk} for number in range(40)]
    made[2]["conversations"] = [{"from": "system", "value": "Be brief."}, *talk]
    (folder / "rows.json").write_text(json.dumps(made))
    return folder / "rows.json"


@pytest.fixture
def ask(tiny_teacher: Path, rows: Path, tmp_path: Path) -> Callable[..., list[Any]]:
    """``ask(template)`` → results of doctor, plan, cache-teacher and eval with it in the tiny teacher's folder."""

    def run(template: str) -> list[Any]:
        model = Path(shutil.copytree(tiny_teacher, tmp_path / "model"))
        (model / "chat_template.jinja").write_text(template)
        data = ["--data", str(rows), "--image-root", str(rows.parent)]
        teacher, shards = ["--teacher", str(model)], ["--shards", "1", "--fields", "response_topk", "--codec", "plain"]
        commands = [
            ["doctor", str(rows), "--image-root", str(rows.parent), *teacher, "--json"],
            ["plan", *teacher, *data, "--shards", "1", "--fields", "response_topk", "--json"],
            ["cache-teacher", *teacher, *data, *shards, "--out", str(tmp_path / "cache"), "--device", "cpu", "--json"],
            ["eval", str(model), *data, "--max-new-tokens", "1", "--json"],
        ]
        return [CliRunner().invoke(main, command) for command in commands]

    return run


def test_refused_rows_are_skipped_and_counted_by_all(ask: Any) -> None:
    doctor, plan, capture, evaluated = ask(NO_SYSTEM)
    (part,) = json.loads(doctor.stdout)["parts"]
    (example,) = part["defects"]["template_refused"]["examples"]
    assert part["usable"] == 39 and "row 2" in example["place"] and "No system role" in example["detail"]
    assert json.loads(plan.stdout)["parts"][0]["skipped_share"] == {"template_refused": 1 / 40}
    assert json.loads(capture.stdout)["columns"]["samples"]["skipped"] == {"template_refused": 1}
    found = json.loads(evaluated.stdout)
    assert found["n"] == 39 and found["skipped"] == {"template_refused": 1}


@pytest.mark.parametrize(
    ("template", "says", "refusing"),
    [
        ("{% for m in messages %}{{ m['role'] }%}", "cannot be used", 4),
        ("{{ raise_exception('never') }}", "never", 4),
        (each(BOTH, prompt=PROMPT.replace("<|assistant|>", "<|assistant|><think>")), "generation prompt", 4),
        (TEXTS, 'part sft: template "chat": the model\'s chat template writes no row with an image', 2),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line_everywhere(
    ask: Any, template: str, says: str, refusing: int
) -> None:
    results = ask(template)
    assert not any(result.exception and not isinstance(result.exception, SystemExit) for result in results)
    refused = [result for result in results if result.exit_code]
    said = [[line for line in one.stderr.splitlines() if line.startswith("Error: ")] for one in refused]
    jobs = results[1:3]
    assert all(result.exit_code == 1 for result in jobs) and len(refused) >= refusing
    assert sum(len(lines) == 1 and says in lines[0] for lines in said) >= refusing


class Asked:
    """Stands where a model does: ``generate`` keeps what it was given, and says nothing."""

    device, dtype, config = torch.device("cpu"), torch.float32, LlavaConfig()

    def generate(self, **inputs: Any) -> torch.Tensor:
        self.ids: torch.Tensor = inputs["input_ids"]
        return self.ids


@pytest.mark.parametrize(
    "template", [ENDLESS, FIRST, "{{ bos_token }}" + each(STRING)], ids=["without", "first", "strings"]
)
def test_prompts_of_eval_and_lmms_eval_are_transformers_own(teacher_parts: Any, template: str) -> None:
    preparer = around(teacher_parts, llama_like(), template, True)
    model, picture = Asked(), PIL.Image.new("RGB", (20, 16), "red")
    talk = Sample(
        "heldout",
        0,
        "",
        "",
        tuple(map(Turn, ("user", "assistant", "user", "assistant"), ("one", "two", "three", "four"))),
    )
    asked = lmms_prompt("What is it?", [picture], "any")
    for prompt in (prompt_of(talk), asked):
        answer(model, preparer.processor, [prompt])
        messages = Chat(preparer.processor).messages(prompt.turns)
        images = {"processor_kwargs": {"images": list(prompt.images)}} if prompt.images else {}
        own = preparer.processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, **images
        )
        assert model.ids[0].tolist() == own["input_ids"][0]
        assert model.ids[0].tolist().count(preparer.tokenizer.bos_token_id) == 1
    assert model.ids[0].tolist() != transformers_own(preparer, talk, prompt=True)


def test_prompts_that_begin_in_two_ways_are_asked_apart(teacher_parts: Any) -> None:
    """A processor adds the first token to all texts of a batch or to none."""
    template = "{% if messages[0]['role'] == 'system' %}{{ bos_token }}{% endif %}" + each(BOTH)
    preparer, model = around(teacher_parts, llama_like(), template, True), Asked()
    system, user = Turn("system", "Be brief."), Turn("user", "one")
    assert len(answer(model, preparer.processor, [Prompt((system, user)), Prompt((user,))])) == 2
    assert model.ids[0].tolist().count(preparer.tokenizer.bos_token_id) == 1


def test_a_question_that_cannot_be_asked_costs_the_others_of_its_batch_nothing(teacher_parts: Any) -> None:
    preparer = around(teacher_parts, llama_like(), NO_SYSTEM, True)
    prompts = [Prompt((Turn("system", "s"), Turn("user", "u"))), Prompt((Turn("user", "u"),))]
    refused, said = answers_or_skips(Asked(), preparer.processor, prompts)
    assert isinstance(refused, SkipSample) and "No system role" in refused.detail and isinstance(said, str)


def test_lmms_eval_shows_pictures_upright() -> None:
    lying = PIL.Image.new("RGB", (20, 16))
    lying.getexif()[0x0112] = 6
    assert lmms_prompt("What?", [lying], "any").images[0].size == (16, 20)
