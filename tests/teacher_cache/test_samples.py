"""The samples column holds what the teacher read: a student that reads it gets the same tokens."""

from __future__ import annotations

import io

import PIL.Image
import pytest
import torch

from teacher_cache.errors import CacheError
from teacher_cache.preparing.prepare import Limits, Preparer
from teacher_cache.records import Image, Sample, Turn
from teacher_cache.samples import decode_sample, encode_sample, hash_ids, response_spans


def png(color: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (96, 96), color).save(buffer, "png")
    return buffer.getvalue()


SAMPLE = Sample(
    "sft",
    3,
    "id é",
    "a.json row 3",
    (
        Turn("user", "<image>\nq 😀"),
        Turn("assistant", "one two"),
        Turn("user", "<image>\nmore"),
        Turn("assistant", "word " * 40),
    ),
    (Image("a/0.png", png((9, 9, 9))), Image("1.png", png((200, 0, 0)))),
    {"family": "x", "score": 1.5},
)


def test_round_trip(teacher_parts) -> None:
    prepared = Preparer(*teacher_parts).prepare(SAMPLE)
    members = encode_sample(SAMPLE, prepared)
    assert list(members) == ["json", "tokens.safetensors", "0.png", "1.png"]
    sample, text, layout = decode_sample(members, "here")
    assert sample == SAMPLE
    assert layout == prepared.layout
    for name in ("ids", "role", "turn", "response"):
        assert torch.equal(getattr(text, name), getattr(prepared.text, name))
        assert getattr(text, name).dtype == getattr(prepared.text, name).dtype
    assert text.image_at == prepared.text.image_at


def test_a_cut_row_is_stored_as_it_was_cut(teacher_parts) -> None:
    """A student with the same limit, that skips rather than cuts, must be able to read it."""
    prepared = Preparer(*teacher_parts, Limits(70, "cut")).prepare(SAMPLE)
    sample, text, _ = decode_sample(encode_sample(SAMPLE, prepared), "here")
    again = Preparer(*teacher_parts, Limits(70, "skip")).prepare(sample)
    assert len(sample.turns) == 2
    assert len(sample.images) == 1
    assert torch.equal(again.input_ids, prepared.input_ids)
    assert torch.equal(again.text.response_ids, text.response_ids)


def test_response_spans_are_hashed_one_by_one(teacher_parts) -> None:
    prepared = Preparer(*teacher_parts).prepare(SAMPLE)
    spans = response_spans(prepared.text)
    assert torch.cat(spans).tolist() == prepared.labels.tolist()
    assert len(spans) == 2
    assert hash_ids(spans[0]) == hash_ids(spans[0].to(torch.int64)) != hash_ids(spans[1])


@pytest.mark.parametrize("drop", ["json", "tokens.safetensors", "1.png"])
def test_a_missing_member_is_a_cache_error(teacher_parts, drop: str) -> None:
    members = encode_sample(SAMPLE, Preparer(*teacher_parts).prepare(SAMPLE))
    del members[drop]
    with pytest.raises(CacheError, match="shard 3"):
        decode_sample(members, "shard 3")


@pytest.mark.parametrize("json", [b"", b"[]", b"null", b'{"turns": 3}', b"{" * 5000, b"\xff"])
def test_any_other_json_is_a_cache_error(teacher_parts, json: bytes) -> None:
    members = encode_sample(SAMPLE, Preparer(*teacher_parts).prepare(SAMPLE))
    with pytest.raises(CacheError, match="not a sample record"):
        decode_sample({**members, "json": json}, "here")
