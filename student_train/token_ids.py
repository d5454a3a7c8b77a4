"""Whether a token id means the same string to a cache's teacher and to a student, string by string.

Equal hashes say so at once. Else the two descriptions (``tokenizer.json``) are compared: tokens by their strings, special ones too, and
what cuts text into them. One side may have further *special* tokens behind the other's last: no text holds them, and of the heads only
the columns that both sides have are compared. Padding rows of heads are no tokens at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from teacher_cache.errors import CacheError, CompatibilityError
from teacher_cache.planning.plan import difference
from teacher_cache.preparing.fingerprint import processor_fingerprint
from teacher_cache.reading.cache import TeacherCache

CUTTING = ("normalizer", "pre_tokenizer")
NOTE = "the tokenizers are equal but for special tokens at their ends: the teacher's has {} and the student's {}"


def check_tokenizer(cache: TeacherCache, field: str, tokenizer: Any, ours: Mapping[str, Any]) -> str:
    """A note for the user, "" where the tokenizers are one; CompatibilityError with the first difference.

    Args:
        field: whose teacher is compared. ours: ``tokenizer`` of the student's ``processor_fingerprint``.
    """
    teacher = cache.fields[field]["teacher"]["tokenizer"]
    if teacher == ours:
        return ""
    theirs = stored_description(cache, field)
    if theirs is None:
        reason = "; ".join(difference(teacher, ours, "tokenizer"))
    else:
        reason = difference_of_tokens(theirs, json.loads(tokenizer.backend_tokenizer.to_str()))
    if reason:
        raise CompatibilityError(
            f"{cache.storage}: field {field} was made by a teacher with another tokenizer: {reason}: "
            "give the student the teacher's tokenizer, or cache a teacher that has the student's"
        )
    return NOTE.format(teacher["length"], ours["length"])


def stored_description(cache: TeacherCache, field: str) -> dict[str, Any] | None:
    """``tokenizer.json`` as the cache keeps it beside the teacher's processor; None where it has none."""
    folder = cache.fields[field]["teacher_folder"]
    if "tokenizer.json" not in cache.processor_files(folder):
        return None
    try:
        body: dict[str, Any] = json.loads(cache.processor_file(folder, "tokenizer.json"))
        tokens_by_id(body)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CacheError(
            f"{cache.storage}/{folder}/processor/tokenizer.json: not a tokenizer's description, or damaged"
        ) from None
    return body


def difference_of_tokens(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first difference that matters between two tokenizer descriptions, in words; "" where there is none."""
    left, right = tokens_by_id(theirs), tokens_by_id(ours)
    for number in sorted(left.keys() & right.keys()):
        if left[number] != right[number]:
            return f"id {number} is {left[number]!r} for the teacher and {right[number]!r} for the student"
    shared = min(max(left, default=-1), max(right, default=-1))
    for who, one, other in (("teacher", left, right), ("student", right, left)):
        special = {each["id"] for each in (theirs, ours)[who == "student"]["added_tokens"] if each["special"]}
        lone = [number for number in sorted(one.keys() - other.keys()) if number <= shared or number not in special]
        if lone:
            return f"only the {who}'s has {one[lone[0]]!r} (id {lone[0]}), which is text to it"
    for part in CUTTING:
        if theirs.get(part) != ours.get(part):
            return f"text is split differently (their {part} differ)"
    models = [{name: value for name, value in one["model"].items() if name != "vocab"} for one in (theirs, ours)]
    return "" if models[0] == models[1] else "words are built differently (their merges or model settings differ)"


def tokens_by_id(description: Mapping[str, Any]) -> dict[int, str]:
    """Every token's string, special and added ones included."""
    vocabulary = description["model"]["vocab"]
    # A unigram model lists (string, score) in the order of ids.
    listed = (
        vocabulary.items() if isinstance(vocabulary, Mapping) else ((one[0], i) for i, one in enumerate(vocabulary))
    )
    tokens = {int(number): str(token) for token, number in listed}
    return tokens | {int(one["id"]): str(one["content"]) for one in description["added_tokens"]}


def check_vocabulary(cache: TeacherCache, fields: set[str], processor: Any) -> list[str]:
    """Token ids mean the same on both sides; rows are compared again as they stream. CompatibilityError where they do not.

    Returns:
        Notes for the user: a chat template of its own gives the student other prompts around the same answers.
    """
    ours = processor_fingerprint(processor)
    notes = []
    for name in sorted(fields):
        if note := check_tokenizer(cache, name, processor.tokenizer, ours["tokenizer"]):
            notes.append(f"{name}: {note}")
        if cache.fields[name]["teacher"]["chat_template"] != ours["chat_template"]:
            notes.append(f"{name}: the teacher read its prompts through another chat template than the student's")
    return notes


def check_head(config: Any, fields: Mapping[str, Any], student: str) -> None:
    """CompatibilityError where the student's head has fewer rows than the vocabulary that the teachers of these fields speak."""
    width = config.get_text_config().vocab_size
    for name, body in fields.items():
        spoken = min(body["teacher"]["head_width"], body["teacher"]["tokenizer"]["length"])
        if width < spoken:
            raise CompatibilityError(
                f"{student}: its head has {width} rows, the teacher of field {name} speaks {spoken} tokens: resize the student's embeddings"
            )
