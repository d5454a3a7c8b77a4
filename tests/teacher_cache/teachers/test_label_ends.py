"""An answer whose last label is no token at which generation ends is told apart from one that ends in another special token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.preparing.prepare import Limits, Preparer
from teacher_cache.records import Sample, Turn
from teacher_cache.teachers.label_ends import NO_END, NO_STOP, LabelEnds, answers_of, label_ends, stop_ids
from teacher_cache.teachers.transformers import TeacherSpec, load_processor
from tests.teacher_cache.preparing.tokenizers_by_hand import llama_like, qwen_like

# LLaVA-1.5's own, in short: a space behind every answer, and no end token.
LLAVA_15 = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TALK = (Turn("user", "What is it?"), Turn("assistant", "A red square."), Turn("user", "one"), Turn("assistant", "two"))
CHAT_ENDS = {"demo": "<|end|>", "qwen": "<|im_end|>", "llama": "</s>"}


@pytest.fixture(scope="module")
def make_folder(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_folder(tokenizer, chat template, eos of generation_config.json)``: ``tiny_teacher`` with those; None: as it is."""

    def make(tokenizer: Any = None, template: str | None = None, stops: Any = None) -> Path:
        folder = tmp_path_factory.mktemp("models") / "teacher"
        shutil.copytree(tiny_teacher, folder)
        if tokenizer is not None:
            processor, config = load_processor(TeacherSpec(str(folder)))
            processor.tokenizer, processor.chat_template = tokenizer, template or tokenizer.chat_template
            config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
            config.eos_token_id = config.text_config.eos_token_id = tokenizer.eos_token_id
            processor.save_pretrained(folder)
            config.save_pretrained(folder)
            stops = stops if stops is not None else tokenizer.eos_token_id
        if stops is not None:
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        return folder

    return make


def opened(folder: Path) -> LabelEnds:
    spec = TeacherSpec(str(folder))
    return label_ends(spec, Preparer(*load_processor(spec), Limits()))


def prepared(ends: LabelEnds, template: str, turns: tuple[Turn, ...] = TALK) -> Any:
    return ends.preparer.prepare(Sample("sft", 0, "", "row 0", turns), template)


@pytest.mark.parametrize("name", CHAT_ENDS)
def test_a_template_that_ends_answers_is_fine(make_folder: Callable[..., Path], name: str) -> None:
    ends = opened(make_folder({"demo": None, "qwen": qwen_like(), "llama": llama_like()}[name]))
    row = prepared(ends, "chat")
    assert [ends.tokenizer.decode(ids[-1:]) for ids in answers_of(row.text)] == [CHAT_ENDS[name]] * 2
    assert ends.look(row, "chat") is None
    assert ends.survey([row], {"sft": "chat"}) == []


def test_llava_15_needs_v1_and_is_told_so(make_folder: Callable[..., Path]) -> None:
    """The pair of ``kdcli init``, whose sft part is ``v1``, and the one that trains students that never stop."""
    ends = opened(make_folder(llama_like(), LLAVA_15))
    end = ends.look(prepared(ends, "chat"), "chat")
    assert end is not None and end.kind == NO_END
    assert end.detail.startswith("2 of 2 answers: the last label is ") and "two" in end.detail
    (line,) = ends.survey([prepared(ends, "chat")] * 3, {"sft": "chat"})
    assert "part 'sft', template 'chat': in 3 of 3 rows" in line and "use --template v1" in line and "'</s>'" in line
    assert ends.survey([prepared(ends, "v1")], {"sft": "v1"}) == []


def test_captions_are_no_answers(make_folder: Callable[..., Path]) -> None:
    ends = opened(make_folder())
    assert ends.look(prepared(ends, "plain", TALK[:2]), "plain") is None


def test_an_end_at_which_generation_does_not_stop(make_folder: Callable[..., Path]) -> None:
    """Idefics's ``<end_of_utterance>``: generation stops there where ``generation_config.json`` lists it, by one id or several."""
    tokenizer = qwen_like()
    tokenizer.eos_token = "<|endoftext|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    lists = make_folder(tokenizer, stops=[tokenizer.eos_token_id, end])
    assert opened(lists).look(prepared(opened(lists), "chat"), "chat") is None
    ends = opened(make_folder(tokenizer))
    found = ends.look(prepared(ends, "chat"), "chat")
    assert found is not None and (found.kind, found.last) == (NO_STOP, end)
    (line,) = ends.survey([prepared(ends, "chat")], {"sft": "chat"})
    assert f"'<|im_end|>' (id {end})" in line and "add its id to eos_token_id" in line


def test_without_a_generation_config_the_configuration_says(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(qwen_like())
    (folder / "generation_config.json").unlink()
    processor, config = load_processor(TeacherSpec(str(folder)))
    stop = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    processor.tokenizer.eos_token = "<|endoftext|>"
    assert stop_ids(TeacherSpec(f"null:{folder}"), processor.tokenizer, config) == {
        stop,
        processor.tokenizer.eos_token_id,
    }


def test_what_stands_behind_the_end_token_does_no_harm(make_folder: Callable[..., Path]) -> None:
    tokenizer = qwen_like()
    template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>\n--\n")
    assert template != tokenizer.chat_template
    ends = opened(make_folder(tokenizer, template))
    row = prepared(ends, "chat")
    assert ends.tokenizer.decode(answers_of(row.text)[0]).endswith("<|im_end|>\n--")
    assert ends.look(row, "chat") is None


def test_one_open_answer_of_several_is_named(make_folder: Callable[..., Path]) -> None:
    template = make_folder() / "chat_template.jinja"
    text = template.read_text().replace("{{ '<|end|>' }}", "{% if not loop.index == 4 %}{{ '<|end|>' }}{% endif %}")
    assert "loop.index" in text
    template.write_text(text)
    ends = opened(template.parent)
    found = ends.look(prepared(ends, "chat"), "chat")
    assert found is not None and found.detail.startswith("1 of 2 answers: the last label is 'two'")
