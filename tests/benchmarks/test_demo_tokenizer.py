"""The demo's tokenizer and processor: a real BPE, capitals and digits alone, 144 placeholders an image."""

import random

import pytest
from PIL import Image

from benchmarks.demo_training.lessons import patch_word_ids
from benchmarks.demo_training.model import build_processor, normalised
from benchmarks.demo_training.stream import IGNORED, encode_row, picture_tensors
from benchmarks.demo_training.tokenizer import SPECIAL_TOKENS, VOCABULARY, load_tokenizer
from pipelines.demo.questions import image_turns
from pipelines.demo.render import render
from pipelines.demo.scenes import sample_scene
from pipelines.demo.world import train_rows


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def test_vocabulary_and_special_tokens(tokenizer):
    assert 4096 <= len(tokenizer) <= 4200 and len(tokenizer) == VOCABULARY
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<pad>")
    assert len(set(patch_word_ids().tolist())) == len(patch_word_ids())


@pytest.mark.parametrize(
    "text", ["What is 3 plus 4?", "JAZZ quiz 907", "naïve — 漢字 🙂\n\ttabs", "a" * 50, "<pad> inside"]
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_capitals_and_digits_are_single_tokens(tokenizer):
    assert tokenizer.tokenize("JAZZ907") == list("JAZZ907")


def test_answers_are_short(tokenizer):
    lengths = [len(tokenizer.encode(t.answer)) for row in train_rows(400, 1) for t in row.turns]
    assert max(lengths) <= 4


def test_template_takes_strings_and_parts(processor):
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q?"}]}]
    plain = [{"role": "user", "content": "<image>\nQ?"}]
    expected = "<|user|><image>\nQ?<|end|><|assistant|>"
    for owner in (processor, processor.tokenizer):
        for messages in (parts, plain):
            assert owner.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == expected
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "A"}]}]
    assert processor.apply_chat_template([*plain, *answer], tokenize=False) == expected + "A<|end|>"


def test_processor_expands_to_144_and_training_saw_the_same_ids(processor):
    rng = random.Random(0)
    scene = sample_scene(rng, "train")
    turns = image_turns(scene, rng, 3)
    messages = []
    for i, turn in enumerate(turns):
        messages.append({"role": "user", "content": ("<image>\n" if i == 0 else "") + turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    text = processor.apply_chat_template(messages, tokenize=False)
    inputs = processor(text=text, images=render(scene), return_tensors="pt")
    ids, targets = encode_row(1, turns)
    assert inputs["input_ids"][0].tolist() == ids
    assert ids.count(processor.image_token_id) == 144
    assert all(target in (IGNORED, ids[i + 1]) for i, target in enumerate(targets[:-1]))
    ours = normalised(picture_tensors([scene])["pixels"])
    assert (inputs["pixel_values"] - ours).abs().max() < 1e-5


def test_any_picture_gives_144_tokens(processor):
    for size in ((40, 200), (640, 480), (96, 96)):
        inputs = processor(text="<image>\nx", images=Image.new("RGB", size), return_tensors="pt")
        assert (inputs["input_ids"] == processor.image_token_id).sum() == 144
