"""Rows become tokens, label masks and positions; every expectation is built by hand from the tokenizer, never from prepare."""

from __future__ import annotations

import io
from dataclasses import replace

import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.errors import CompatibilityError, KdcliError, SkipSample
from teacher_cache.preparing.chat import content
from teacher_cache.preparing.prepare import Limits, Preparer
from teacher_cache.records import Image, Sample, Turn

GRID = (6, 6)
TOKENS = 36


def png(size: tuple[int, int] = (96, 96), color: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, color).save(buffer, "png")
    return buffer.getvalue()


def row(*turns: tuple[str, str], images: tuple[bytes, ...] = ()) -> Sample:
    named = tuple(Image(f"{i}.png", data) for i, data in enumerate(images))
    return Sample("sft", 7, "id", "a.json row 7", tuple(Turn(*turn) for turn in turns), named)


@pytest.fixture(scope="module")
def preparer(teacher_parts) -> Preparer:
    return Preparer(*teacher_parts)


@pytest.fixture(scope="module")
def tokenizer(teacher_parts):
    return teacher_parts[0].tokenizer


def by_hand(
    tokenizer, turns: tuple[Turn, ...], tokens: int = TOKENS
) -> tuple[list[int], list[bool], list[int], list[int]]:
    """(ids, label flags, role, turn) of a chat row, one token at a time. Special tokens split the text, so pieces are exact."""
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids, label, role, number = [], [], [], []

    def put(pieces: list[int], is_label: bool) -> None:
        ids.extend(pieces)
        label.extend([is_label] * len(pieces))

    for i, turn in enumerate(turns):
        answer = turn.role == "assistant"
        put([tokenizer.convert_tokens_to_ids(f"<|{turn.role}|>")], False)
        pieces = turn.text.split("<image>")
        texts = [piece.strip("\n") if len(pieces) > 1 else piece for piece in pieces]
        put(tokenizer(texts[0], add_special_tokens=False)["input_ids"] if texts[0] else [], answer)
        for text in texts[1:]:
            put([image] * tokens, False)
            put(tokenizer("\n" + text, add_special_tokens=False)["input_ids"], answer)
        put([tokenizer.convert_tokens_to_ids("<|end|>")], answer)
        role += [("system", "user", "assistant").index(turn.role)] * (len(ids) - len(role))
        number += [i] * (len(ids) - len(number))
    return ids, label, role, number


CHAT_ROWS = [
    row(("user", "<image>\nWhat is this?"), ("assistant", "A red square."), images=(png(),)),
    row(("user", "No picture"), ("assistant", "fine."), ("user", "again?"), ("assistant", " yes\n")),
    row(("system", "Be short."), ("user", "<image>\nWhy"), ("assistant", "12 34 é😀"), images=(png(),)),
    row(("user", "<image>\n<image>\nSame?"), ("assistant", "no"), images=(png(), png((50, 80)))),
    row(("user", "first"), ("assistant", "ok"), ("user", "look <image> there"), ("assistant", "x"), images=(png(),)),
    row(("user", "what"), ("assistant", "answered"), ("user", "and no answer")),
]


@pytest.mark.parametrize("sample", CHAT_ROWS)
def test_chat_rows_token_by_token(preparer: Preparer, tokenizer, sample: Sample) -> None:
    ids, label, role, number = by_hand(tokenizer, sample.turns)
    made = preparer.prepare(sample)
    image = preparer.image_token_id
    text_at = [i for i, token in enumerate(ids) if token != image]
    assert made.input_ids.tolist() == ids
    assert made.vision_positions.tolist() == [i for i, token in enumerate(ids) if token == image]
    assert made.text_positions.tolist() == text_at
    assert made.text.ids.tolist() == [ids[i] for i in text_at]
    assert made.text.response.tolist() == [label[i] for i in text_at]
    assert made.text.role.tolist() == [role[i] for i in text_at]
    assert made.text.turn.tolist() == [number[i] for i in text_at]
    assert len(made.vision_positions) == TOKENS * len(sample.images)
    assert [one.views[0].grid for one in made.layout] == [GRID] * len(sample.images)


@pytest.mark.parametrize("sample", CHAT_ROWS)
def test_response_rows_stand_one_before_their_label(preparer: Preparer, tokenizer, sample: Sample) -> None:
    ids, label, _, _ = by_hand(tokenizer, sample.turns)
    made = preparer.prepare(sample)
    wanted = [(t - 1, ids[t]) for t in range(len(ids)) if label[t]]
    assert list(zip(made.response_rows.tolist(), made.labels.tolist())) == wanted
    assert torch.equal(made.input_ids[made.response_rows + 1], made.labels)
    assert not set(made.response_rows.tolist()) & set(made.vision_positions.tolist())


def test_image_at_counts_the_text_tokens_before_each_image(preparer: Preparer) -> None:
    made = preparer.prepare(CHAT_ROWS[3])
    first = made.vision_positions[::TOKENS].tolist()
    expected = [sum(1 for at in made.text_positions.tolist() if at < start) for start in first]
    assert list(made.text.image_at) == expected


def test_plain_keeps_the_caption_only(preparer: Preparer, tokenizer) -> None:
    sample = row(("user", "Describe it.\n<image>"), ("assistant", " a red square "), images=(png(),))
    made = preparer.prepare(sample, "plain")
    caption = tokenizer("a red square\n", add_special_tokens=False)["input_ids"]
    assert made.input_ids.tolist() == [preparer.image_token_id] * TOKENS + caption
    assert made.labels.tolist() == caption
    assert made.response_rows.tolist() == list(range(TOKENS - 1, TOKENS + len(caption) - 1))
    assert made.text.role.tolist() == [2] * len(caption)


def test_plain_without_a_picture_has_no_label_on_its_first_token(preparer: Preparer, tokenizer) -> None:
    made = preparer.prepare(row(("user", "say"), ("assistant", "two words")), "plain")
    caption = tokenizer("two words\n", add_special_tokens=False)["input_ids"]
    assert made.input_ids.tolist() == caption
    assert made.labels.tolist() == caption[1:]
    assert made.response_rows.tolist() == list(range(len(caption) - 1))


def test_expansion_and_pixels_are_the_processors_own(preparer: Preparer, teacher_parts) -> None:
    processor = teacher_parts[0]
    for sample in CHAT_ROWS:
        messages = [{"role": turn.role, "content": content(turn.text)} for turn in sample.turns]
        pictures = [PIL.Image.open(io.BytesIO(image.data)) for image in sample.images]
        text = processor.apply_chat_template(messages, tokenize=False)
        theirs = processor(text=[text], **({"images": pictures} if pictures else {}), return_tensors="pt")
        ours = preparer.prepare(sample)
        assert torch.equal(theirs["input_ids"][0], ours.input_ids)
        assert ("pixel_values" in theirs) == ("pixel_values" in ours.pixels)
        if pictures:
            assert torch.equal(theirs["pixel_values"], ours.pixels["pixel_values"])


def test_layout_says_what_the_centre_crop_shows(preparer: Preparer) -> None:
    sample = row(("user", "<image>\n?"), ("assistant", "x"), images=(png((200, 96)),))
    (layout,) = preparer.prepare(sample).layout
    assert layout.size == (200, 96)
    assert layout.views[0].crop == (52, 0, 148, 96)


LONG = row(("user", "<image>\nq"), ("assistant", "one"), ("user", "more"), ("assistant", "word " * 40), images=(png(),))


def test_over_length_is_skipped(teacher_parts) -> None:
    with pytest.raises(SkipSample, match="over_length") as caught:
        Preparer(*teacher_parts, Limits(max_length=60)).prepare(LONG)
    assert caught.value.reason == "over_length"


def test_over_length_is_cut_at_an_exchange(teacher_parts, tokenizer) -> None:
    cut = Preparer(*teacher_parts, Limits(max_length=60, over_length="cut")).prepare(LONG)
    ids, label, _, _ = by_hand(tokenizer, LONG.turns[:2])
    assert cut.input_ids.tolist() == ids
    assert cut.labels.tolist() == [token for token, is_label in zip(ids, label) if is_label]
    with pytest.raises(SkipSample, match="over_length"):
        Preparer(*teacher_parts, Limits(max_length=20, over_length="cut")).prepare(LONG)


def test_a_cut_drops_an_unanswered_question_first(teacher_parts, tokenizer) -> None:
    sample = row(("user", "q"), ("assistant", "one"), ("user", "word " * 40))
    cut = Preparer(*teacher_parts, Limits(max_length=20, over_length="cut")).prepare(sample)
    assert cut.input_ids.tolist() == by_hand(tokenizer, sample.turns[:2])[0]


def test_a_cut_drops_the_images_of_what_it_drops(teacher_parts) -> None:
    turns = (("user", "<image>\nq"), ("assistant", "one"), ("user", "<image>\nmore"), ("assistant", "two"))
    sample = row(*turns, images=(png(), png(color=(1, 2, 3))))
    cut = Preparer(*teacher_parts, Limits(max_length=60, over_length="cut")).prepare(sample)
    assert len(cut.layout) == 1
    assert cut.pixels["pixel_values"].shape[0] == 1
    assert len(cut.vision_positions) == TOKENS


def test_exactly_max_length_is_kept(preparer: Preparer, teacher_parts) -> None:
    length = len(preparer.prepare(LONG))
    assert len(Preparer(*teacher_parts, Limits(max_length=length)).prepare(LONG)) == length
    with pytest.raises(SkipSample):
        Preparer(*teacher_parts, Limits(max_length=length - 1)).prepare(LONG)


@pytest.mark.parametrize("token", ["<|end|>", "<|assistant|>", "<pad>"])
def test_reserved_tokens_in_the_text_are_skipped(preparer: Preparer, token: str) -> None:
    for turns in ((("user", f"a {token} b"), ("assistant", "x")), (("user", "a"), ("assistant", f"x{token}"))):
        for template in ("chat", "plain"):
            with pytest.raises(SkipSample) as caught:
                preparer.prepare(row(*turns), template)
            assert caught.value.reason == "reserved_token"


def test_limits_and_templates_are_checked(preparer: Preparer) -> None:
    with pytest.raises(KdcliError, match="skip or cut"):
        Limits(over_length="drop")
    with pytest.raises(KdcliError, match="chat, plain"):
        preparer.prepare(CHAT_ROWS[0], "vicuna")


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=30).filter(lambda t: "<" not in t)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(text, text.filter(lambda t: t.strip())), min_size=1, max_size=3), st.integers(0, 2))
def test_any_text_is_masked_as_by_hand(preparer: Preparer, tokenizer, exchanges, images: int) -> None:
    turns = [turn for question, answer in exchanges for turn in (("user", question), ("assistant", answer))]
    turns[0] = ("user", "<image>\n" * images + turns[0][1].strip("\n"))
    sample = row(*turns, images=(png(),) * images)
    ids, label, role, _ = by_hand(tokenizer, sample.turns)
    made = preparer.prepare(replace(sample))
    assert made.input_ids.tolist() == ids
    assert made.labels.tolist() == [token for token, is_label in zip(ids, label) if is_label]
    assert made.response_rows.tolist() == [t - 1 for t, is_label in enumerate(label) if is_label]
    assert made.text.role.tolist() == [r for r, token in zip(role, ids) if token != preparer.image_token_id]


class Moody:
    """The processor, which raises ``error`` at pictures 33 pixels wide."""

    def __init__(self, processor, error: Exception):
        self._processor, self._error = processor, error

    def __getattr__(self, name: str):
        return getattr(self._processor, name)

    def __call__(self, **given):
        if any(picture.size[0] == 33 for pictures in given.get("images", ()) for picture in pictures):
            raise self._error
        return self._processor(**given)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ZeroDivisionError("integer division or modulo by zero"),
            "ZeroDivisionError: integer division or modulo by zero",
        ),
        (RuntimeError("shape '[2, 0]' is invalid\nfor input"), "RuntimeError: shape '[2, 0]' is invalid for input"),
        (
            ValueError("absolute aspect ratio must be smaller than 200"),
            "absolute aspect ratio must be smaller than 200",
        ),
        (ValueError(), "ValueError"),
        (TypeError("'NoneType' object"), "TypeError: 'NoneType' object"),
        (KeyError("views"), "KeyError: 'views'"),
        (OverflowError("too large"), "OverflowError: too large"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_whatever_a_processor_raises_at_a_row_is_its_skip_record(teacher_parts, error: Exception, said: str) -> None:
    processor, config = teacher_parts
    preparer = Preparer(Moody(processor, error), config)
    turns = ("user", "<image>\nwhat?"), ("assistant", "red")
    assert len(preparer.prepare(row(*turns, images=(png((40, 40)),))).vision_positions) == TOKENS
    with pytest.raises(SkipSample) as caught:
        preparer.prepare(row(*turns, images=(png((33, 40)),)))
    assert caught.value.reason == "processor_refused"
    assert caught.value.detail == f"the processor refuses the row: {said}"


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), CompatibilityError("not this family")],
    ids=["memory", "torch's memory", "the model as a whole"],
)
def test_what_is_not_the_rows_own_is_no_skip_record(teacher_parts, error: Exception) -> None:
    processor, config = teacher_parts
    with pytest.raises(type(error)):
        Preparer(Moody(processor, error), config).prepare(
            row(("user", "<image>\nwhat?"), ("assistant", "red"), images=(png((33, 40)),))
        )


def test_what_a_processor_says_of_every_token_is_refused_where_it_is_not_known(teacher_parts) -> None:
    """PaliGemma's token types let the whole row, answer and all, be seen from everywhere."""
    processor, config = teacher_parts

    class Typed(Moody):
        def __call__(self, **given):
            said = self._processor(**given)
            return {**said, "token_type_ids": torch.zeros_like(said["input_ids"])}

    sample = row(("user", "<image>\nwhat?"), ("assistant", "red"), images=(png(),))
    with pytest.raises(CompatibilityError, match=r"a\.json row 7: the processor says token_type_ids for every token"):
        Preparer(Typed(processor, ValueError()), config).prepare(sample)


def test_a_layout_that_is_wrong_for_a_row_is_its_skip_record(
    preparer: Preparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from teacher_cache.preparing import prepare
    from teacher_cache.records import ImageLayout, View

    sample = row(("user", "<image>\nwhat?"), ("assistant", "red"), images=(png((33, 40)),))
    whole = View((0, 0, 33, 40), GRID)
    for views, said in (
        (None, r"its images have an unknown vision layout \(33 × 40 pixels\): ZeroDivisionError"),
        ((whole, whole), "does not account for the 36 vision tokens"),
        ((whole, View((0, 0, 33, 40), (0, 6))), "so narrow that a view of it keeps no patch"),
    ):
        layouts = lambda *_, v=views: (1 // 0) if v is None else (ImageLayout((33, 40), v),)  # noqa: E731
        monkeypatch.setattr(prepare, "image_layout", layouts)
        with pytest.raises(SkipSample, match=f"processor_refused: .*{said}"):
            preparer.prepare(sample)
