"""Real tokenizers with their own chat templates: a row's token ids are transformers' own.

``KDCLI_TOKENIZERS`` names a folder of tokenizer folders (Llama 3, Gemma 3, Qwen 3, SmolLM2, …). None is shipped: without it all is skipped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.errors import SkipSample
from teacher_cache.preparing.prepare import Preparer
from tests.teacher_cache.preparing.test_chat import (
    ENDLESS,
    ROWS,
    SYSTEM,
    TALK,
    TEXT,
    around,
    said,
    sample,
    transformers_own,
)

FOLDER = Path(os.environ.get("KDCLI_TOKENIZERS", "/nowhere"))
NAMES = sorted(one.parent.name for one in FOLDER.glob("*/tokenizer.json"))


def preparer_of(loaded: tuple[Any, Any], name: str, on_processor: bool) -> Preparer:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
    tokenizer.image_token = "<start_of_image>" if "<start_of_image>" in tokenizer.get_vocab() else "<image>"
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [tokenizer.image_token]}, replace_extra_special_tokens=False
    )
    return around(loaded, tokenizer, tokenizer.chat_template or ENDLESS, on_processor)


@pytest.mark.skipif(not NAMES, reason="KDCLI_TOKENIZERS names no folder of tokenizers")
@pytest.mark.parametrize("on_processor", [True, False])
@pytest.mark.parametrize("name", NAMES or ["none"])
def test_ids_of_a_real_tokenizer_are_transformers_own(teacher_parts: Any, name: str, on_processor: bool) -> None:
    preparer = preparer_of(teacher_parts, name, on_processor)
    preparer.check_template("chat")
    if on_processor:
        preparer.check_images("sft", "chat")
    for turns in ROWS:
        row = sample(turns)
        if row.images and not on_processor:
            continue
        made = preparer.prepare(row)
        assert made.input_ids.tolist() == transformers_own(preparer, row)
        answers = [text.strip() for role, text in turns if role == "assistant"]
        assert all(answer in label for answer, label in zip(answers, said(preparer, made), strict=True))
        text, begins = preparer.chat.prompt(row.turns[:1] if turns != SYSTEM else row.turns[:2])
        if not row.images:
            asked = preparer.tokenizer(text, add_special_tokens=begins)["input_ids"]
            assert asked == made.input_ids[: len(asked)].tolist()


@pytest.mark.skipif("qwen3" not in NAMES, reason="KDCLI_TOKENIZERS names no folder with qwen3")
def test_qwen3_begins_the_last_answer_with_its_thoughts(teacher_parts: Any) -> None:
    preparer = preparer_of(teacher_parts, "qwen3", True)
    thought = ("assistant", "<think>\nhm\n</think>\n\nIt.")
    empty = "<think>\n\n</think>\n\n"
    assert said(preparer, preparer.prepare(sample(TEXT))) == [f"{empty}It.<|im_end|>"]
    assert said(preparer, preparer.prepare(sample(TALK))) == ["Red?<|im_end|>", f"{empty} Yes, red. <|im_end|>"]
    assert said(preparer, preparer.prepare(sample((TEXT[0], thought)))) == [f"{thought[1]}<|im_end|>"]
    with pytest.raises(SkipSample, match="template_refused"):
        preparer.prepare(sample((TEXT[0], thought, *TEXT)))
