"""What a model card says, and what it keeps to itself."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.export.card import loading, model_card, place, results, training
from pipelines.export.provenance import Provenance
from teacher_cache.errors import KdcliError


def test_results_of_models_of_one_name_stay_apart() -> None:
    def scores(share: float) -> dict[str, object]:
        tally = {"n": 4, "exact_match": share, "tokens": 4, "nll": 1.0}
        return {**tally, "family_mean": share, "nll_family_mean": 1.0, "families": {"count": tally}}

    names = {
        "/home/a/runs/03-DFT/model": scores(0.25),
        "/home/b/runs/03-DFT/model": scores(0.75),
        "hub/id": scores(0.5),
    }
    text = results(Provenance(Path("model"), None, (), None, names))
    header, _, row, *_ = text.splitlines()
    assert [cell.strip() for cell in header.split("|")[2:-2]] == ["03-DFT/model (1)", "03-DFT/model (2)", "hub/id"]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["count", "25.0", "75.0", "50.0", "4"]
    assert "home" not in text


def test_places_of_a_machine_are_not_told() -> None:
    assert place("/home/a/cache") == "cache" and place("~/student") == "student"
    assert (
        place("s3://bucket/cache") == "s3://bucket/cache"
        and place("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    )


def test_the_prompt_of_a_card_is_that_of_the_training() -> None:
    """In a program that can be run: the chat template, or LLaVA's conversation as it was written for training."""
    chat, v1 = (loading(None, "student", template) for template in ("chat", "v1"))
    assert "apply_chat_template" in chat and "tokenize=True" in chat
    (line,) = [one for one in v1.splitlines() if one.startswith("text = ")]
    assert line.split("  #")[0].endswith(r'questions. USER: <image>\nWhat is in the picture? ASSISTANT:"')
    assert "apply_chat_template" not in v1 and "add_special_tokens" not in v1, (
        "the processor adds the first token by itself"
    )
    for text in (chat, v1):
        compile(text.removeprefix("```python\n").removesuffix("\n```"), "card", "exec")


NASTY = (
    "a\n---\nlicense: mit",
    "<script>alert(1)</script>",
    "`x` ```` | y |",
    "[here](javascript:x)",
    "# title\n\n- **Teacher**: other",
    '"); import os; os.system("id") #',
    "```\n```python\nprint(1)",
)


@pytest.mark.parametrize("images", [True, False], ids=["images", "text"])
@pytest.mark.parametrize("text", NASTY)
def test_no_text_of_a_run_is_markup(text: str, images: bool) -> None:
    """Whatever stands in run.json, done.json and the scores stays within its line, its code span and its cell."""
    tally = {"n": 4, "exact_match": 0.5, "tokens": 4, "nll": 1.0}
    scores = {text: {**tally, "family_mean": 0.5, "nll_family_mean": 1.0, "families": {text: tally}}}
    settings = {"student": text, "learning_rate": 1e-3, "seed": text, "bf16": False}
    stage = {
        "stage": text,
        "method": text,
        "knobs": {text: text},
        "parts": [text],
        "fields": {"n": [text]},
        "settings": settings,
    }
    card = {"cache": text, "plan_hash": text, "versions": {text: text}, "git": text}
    teacher = {"architecture": text, "weights": text, "tokenizer": {"sha256": text}, "dtype": text, "backend": text}
    cache = {"rows": {text: 3}, "fields": {text: {"teacher": teacher}}}
    stages = ({**stage, "result": {"steps": text, "samples": text}},)
    made = model_card(Provenance(Path("m"), card, stages, cache, scores), None, "float32", text, text, images=images)
    plain_card = model_card(Provenance(Path("m"), None, (), None, {}), None, "float32", "student", "llava")
    assert made.count("\n---") == plain_card.count("\n---") == 1 and yaml_of(made)["tags"][1] == "distillation"
    assert "license" not in yaml_of(made)
    outside = re.sub(r"(?s)^```python\n.*?^```$", "", made.split("---\n", 2)[2], flags=re.M)
    outside = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", outside)
    for mark in ("<script", "](javascript", "**Teacher**: other", "\n# title"):
        assert mark not in outside
    rows = [line for line in made.splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1
    (program,) = re.findall(r"(?sm)^```python\n(.*?)^```$", made)
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
    assert "os.system" not in calls


def yaml_of(card: str) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_has_no_secrets() -> None:
    origin = Provenance(
        Path("m"), {"cache": "https://me:pw@host/c?X-Amz-Signature=abc", "plan_hash": "p"}, (), None, {}
    )
    assert "`https://***@host/c?X-Amz-Signature=***`" in training(replace(origin, stages=(STAGE,)))


def test_a_record_that_is_none_is_one_line() -> None:
    for card in ({}, {"cache": 3}, {"cache": "c", "plan_hash": "p", "versions": []}):
        with pytest.raises(KdcliError, match=r"run\.json, done\.json"):
            model_card(Provenance(Path("m"), card, (STAGE,), None, {}), None, "float32", "s", "llava")


STAGE = {
    "stage": "SFT",
    "method": "sft",
    "parts": ["sft"],
    "result": {},
    "settings": {"student": "s", "learning_rate": 1.0, "seed": 0, "bf16": False},
}
