"""Rows of a model that reads text alone: the very tokens and labels of the multimodal path, and of the tokenizer itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from teacher_cache.errors import CompatibilityError, SkipSample
from teacher_cache.models.kind import TextProcessor
from teacher_cache.preparing.fingerprint import is_text_alone
from teacher_cache.preparing.known_text import KnownText, same_text_side
from teacher_cache.preparing.prepare import Limits, Preparer
from teacher_cache.records import Image, Sample, Turn
from teacher_cache.sources import DataSpec, open_source
from teacher_cache.teachers.label_ends import label_ends
from teacher_cache.teachers.transformers import TeacherSpec, load_processor
from tests.text_models import build_text_folder, write_rows

TALK = (
    Turn("system", "Be brief."),
    Turn("user", " What is 1 plus 2?"),
    Turn("assistant", "3 \n"),
    Turn("user", "Which letter comes after A?"),
    Turn("assistant", "B"),
)


def sample(*turns: Turn, images: tuple[Image, ...] = ()) -> Sample:
    return Sample("sft", 0, "", "a row", turns, images)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_processor(TeacherSpec(str(build_text_folder(tmp_path_factory.mktemp("rows") / "llama"))))


def same(one: Any, other: Any) -> bool:
    names = ("input_ids", "vision_positions", "text_positions", "response_rows", "labels")
    texts = ("ids", "role", "turn", "response")
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in names) and all(
        torch.equal(getattr(one.text, n), getattr(other.text, n)) for n in texts
    )


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_tokens_and_labels_are_those_of_the_multimodal_path(parts: Any, teacher_parts: Any, template: str) -> None:
    """The same tokenizer and template: a row without images becomes the same in both forms, the short way from stored tokens too."""
    ours, theirs = Preparer(*parts), Preparer(*teacher_parts)
    turns = TALK if template == "chat" else TALK[1:3]
    text, both = (one.prepare(sample(*turns), template) for one in (ours, theirs))
    assert same(text, both) and text.key == both.key and not text.pixels and not text.layout
    assert same(KnownText(ours).prepare(sample(*turns), text.text, text.key, template, 1 << 30), text)
    assert not same_text_side(ours.fingerprint(), {**theirs.fingerprint(), "chat_template": "another"})
    assert is_text_alone(ours.fingerprint()) and not is_text_alone(theirs.fingerprint())


def test_tokens_are_what_the_tokenizer_makes_of_the_conversation(parts: Any) -> None:
    row = Preparer(*parts).prepare(sample(*TALK))
    tokenizer = parts[0].tokenizer
    messages = [{"role": turn.role, "content": turn.text} for turn in TALK]
    assert row.input_ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    end, answers = tokenizer.eos_token_id, tokenizer.decode(row.labels)
    assert row.labels.tolist().count(end) == 2 and answers == "3 \n<|end|>B<|end|>"


@pytest.mark.parametrize("template", ["v1", "qwen_1_5"])
def test_templates_written_here_serve_base_models(template: str, tmp_path: Path) -> None:
    """A tokenizer that knows their tokens is enough; it needs no chat template, no image token."""
    processor, config = load_processor(TeacherSpec(str(build_text_folder(tmp_path / "base", chat=False))))
    preparer = Preparer(processor, config)
    with pytest.raises(CompatibilityError, match=r"needs .* as one token each"):
        preparer.check_template(template)
    ends = {"v1": ["</s>"], "qwen_1_5": ["<|im_start|>", "<|im_end|>"]}[template]
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ends})
    row = Preparer(processor, config).prepare(sample(*TALK), template)
    assert row.labels.tolist().count(processor.tokenizer.convert_tokens_to_ids(ends[-1])) == 2


def test_a_base_model_is_told_what_to_give(tmp_path: Path) -> None:
    folder = build_text_folder(tmp_path / "base", chat=False)
    preparer = Preparer(*load_processor(TeacherSpec(str(folder))))
    with pytest.raises(
        CompatibilityError, match=r'no chat template.*chat_template.jinja.*"plain".*"qwen_1_5"'
    ) as found:
        preparer.check_template("chat")
    assert "\n" not in str(found.value)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    preparer = Preparer(*load_processor(TeacherSpec(str(folder))))
    preparer.check_template("chat")
    row = preparer.prepare(sample(*TALK))
    assert preparer.tokenizer.decode(row.labels) == "3 \n<|end|>B<|end|>"
    assert label_ends(TeacherSpec(str(folder)), preparer).survey([row], {"sft": "chat"}) == []


def test_a_row_with_images_is_a_skip_with_its_reason(parts: Any) -> None:
    preparer = Preparer(*parts)
    turns = (Turn("user", "<image>\nWhat is this?"), Turn("assistant", "A fact."))
    with pytest.raises(SkipSample, match="images_unread: 1 images, and the model is text-only"):
        preparer.prepare(sample(*turns, images=(Image("a.png", b"never looked at"),)))
    preparer.check_images("sft", "chat")  # no error of the model's


def test_a_long_row_is_cut_at_a_turn_border(parts: Any) -> None:
    whole = Preparer(*parts).prepare(sample(*TALK))
    short = Preparer(*parts, Limits(len(whole) - 1, "cut")).prepare(sample(*TALK))
    assert short.turns == 3 and torch.equal(short.input_ids, whole.input_ids[: len(short)])


def test_every_text_format_becomes_the_same_rows(parts: Any, tmp_path: Path) -> None:
    """messages (jsonl, parquet), LLaVA json without images, prompt and completion."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    jsonl = write_rows(tmp_path / "rows.jsonl", rows=6)
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    rows = [{**row, "messages": [m for m in row["messages"] if m["role"] != "system"]} for row in rows]
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    talk = [
        {
            "id": row["id"],
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
                for m in row["messages"]
            ],
        }
        for row in rows
    ]
    (tmp_path / "rows.json").write_text(json.dumps(talk))
    single = [row for row in rows if len(row["messages"]) == 2]
    pairs = [
        {"id": r["id"], "prompt": r["messages"][0]["content"], "completion": r["messages"][1]["content"]}
        for r in single
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in pairs))
    preparer = Preparer(*parts)

    def read(name: str) -> list[Any]:
        source = open_source(DataSpec("sft", str(tmp_path / name)))
        return [preparer.prepare(row) for group in source.scan(4) for row in source.read(group)]

    wanted = read("rows.jsonl")
    assert len(wanted) == 6
    for name, own in (("rows.parquet", wanted), ("rows.json", wanted), ("pairs.jsonl", [wanted[i] for i in (0, 2, 4)])):
        found = read(name)
        assert len(found) == len(own) and all(map(same, found, own)), name


def test_a_processor_of_text_is_like_none_with_images(parts: Any) -> None:
    """``Preparer.like`` of a plan by a model of images: a student that reads text alone prepares its rows as that plan says."""
    preparation = {**Preparer(*parts).fingerprint(), "image_processor": {"class": "CLIP"}}
    student = Preparer.like(preparation, TextProcessor(parts[0].tokenizer), parts[1])
    assert same(student.prepare(sample(*TALK)), Preparer(*parts).prepare(sample(*TALK)))
    assert replace(student.limits) == Limits(preparation["max_length"], preparation["over_length"])
