"""Tokenizers are one where every id is the same string and text is cut alike; the first difference is told in words."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.capture.describe import processor_receipt
from student_train.token_ids import check_tokenizer, difference_of_tokens, tokens_by_id
from teacher_cache.errors import CacheError, CompatibilityError
from teacher_cache.preparing.fingerprint import processor_fingerprint
from teacher_cache.reading.cache import TeacherCache

SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
DESCRIPTION: dict[str, Any] = {
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel"},
    "post_processor": None,
    "added_tokens": [{"id": 4, "content": "<end>", **SPECIAL}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "abb": 3}, "merges": [["a", "b"], ["ab", "b"]]},
}


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    body = copy.deepcopy(DESCRIPTION)
    change(body)
    return body


def add(number: int, content: str, special: bool = True) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body["added_tokens"].append({**SPECIAL, "id": number, "content": content, "special": special})


ALIKE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda body: None,
    "a special token more": add(5, "<image>"),
    "two, not side by side": lambda body: (add(5, "<image>")(body), add(9, "<video>")(body)),
    "a template around one text": lambda body: body.update(post_processor={"type": "TemplateProcessing"}),
    "a token said to be special or not": lambda body: body["added_tokens"][0].update(special=False, lstrip=True),
}
OTHER: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another special string": (
        lambda body: body["added_tokens"][0].update(content="<image>"),
        "id 4 is '<end>' for the teacher and '<image>' for the student",
    ),
    "two words changed places": (
        lambda body: body["model"].update(vocab={"b": 0, "a": 1, "ab": 2, "abb": 3}),
        "id 0 is 'a' for the teacher and 'b' for the student",
    ),
    "a word more": (add(5, "zebra", special=False), "only the student's has 'zebra' (id 5), which is text to it"),
    "a word less": (
        lambda body: body["model"]["vocab"].pop("abb"),
        "only the teacher's has 'abb' (id 3), which is text to it",
    ),
    "other spaces": (
        lambda body: body.update(pre_tokenizer={"type": "Whitespace"}),
        "text is split differently (their pre_tokenizer differ)",
    ),
    "other merges": (
        lambda body: body["model"]["merges"].reverse(),
        "words are built differently (their merges or model settings differ)",
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_no_text_meets_makes_no_difference(name: str) -> None:
    other = changed(ALIKE[name])
    assert difference_of_tokens(DESCRIPTION, other) == difference_of_tokens(other, DESCRIPTION) == ""


@pytest.mark.parametrize("name", OTHER)
def test_the_first_difference_is_named(name: str) -> None:
    change, words = OTHER[name]
    assert difference_of_tokens(DESCRIPTION, changed(change)) == words


def test_a_unigram_model_lists_its_tokens_in_order() -> None:
    body = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": []}
    assert tokens_by_id(body) == {0: "a", 1: "b"}


def student_tokenizer(special: str | None) -> Any:
    from benchmarks.demo_training.tokenizer import load_tokenizer

    tokenizer = load_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    return tokenizer


def test_the_cache_is_asked_for_its_teachers_strings(tiny_cache: Path, teacher_parts: Any, copy_of: Any) -> None:
    processor = copy.copy(teacher_parts[0])
    cache = TeacherCache(str(tiny_cache))
    for special, note in ((None, ""), ("<video>", "has 4160 and the student's 4161")):
        processor.tokenizer = student_tokenizer(special)
        said = check_tokenizer(
            cache, "vision_hidden", processor.tokenizer, processor_fingerprint(processor)["tokenizer"]
        )
        assert note in said and bool(said) == bool(special)

    damaged = copy_of(tiny_cache)
    (file,) = damaged.glob("teacher/*/processor/tokenizer.json")
    (receipt,) = damaged.glob("teacher/*/processor.json")
    ours = processor_fingerprint(processor)["tokenizer"]
    file.write_text(json.dumps({"model": 3}))
    with pytest.raises(CacheError, match=r"tokenizer\.json does not have its checksum"):
        check_tokenizer(TeacherCache(str(damaged)), "vision_hidden", processor.tokenizer, ours)
    receipt.write_bytes(processor_receipt({"tokenizer.json": file.read_bytes()}))
    with pytest.raises(CacheError, match="not a tokenizer's description"):
        check_tokenizer(TeacherCache(str(damaged)), "vision_hidden", processor.tokenizer, ours)
    file.unlink()
    with pytest.raises(CacheError, match=r"tokenizer\.json is missing"):
        check_tokenizer(TeacherCache(str(damaged)), "vision_hidden", processor.tokenizer, ours)
    receipt.write_bytes(processor_receipt({}))  # a cache that lacks the strings is judged by hash and length
    with pytest.raises(CompatibilityError, match=r"another tokenizer: tokenizer\.length: cache 4160, here 4161"):
        check_tokenizer(TeacherCache(str(damaged)), "vision_hidden", processor.tokenizer, ours)
