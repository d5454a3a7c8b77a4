"""The demo world's tokenizer: a real byte-level BPE, trained on the world's text and on English from the stdlib.

Digits and capitals are tokens of their own: a word that is *drawn* in capitals is spelled letter by letter, so reading
is something a vision token can support. Everything else is ordinary BPE.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.demo_training import ASSETS
from benchmarks.demo_training.patch_labels import PATCH_WORDS
from pipelines.demo.questions import CAPTION_REQUESTS, caption, compare_turn, image_turns
from pipelines.demo.scenes import WORDS, sample_scene
from pipelines.demo.text_turns import text_turn

VOCABULARY = 4160
SPECIAL_TOKENS = ("<pad>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<image>")
TOKENIZER_FOLDER = ASSETS / "tokenizer"
# A message's content is a string or a list of {"type": "image"} / {"type": "text", "text": ...} parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Trains the tokenizer (seconds). The shipped one is in ``TOKENIZER_FOLDER``; the stdlib text varies by version."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9]|[A-Z]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(random.Random(seed)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>", "<image>"],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(folder: Path = TOKENIZER_FOLDER) -> PreTrainedTokenizerFast:
    """The shipped tokenizer, chat template included."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _corpus(rng: random.Random) -> Iterator[str]:
    from pydoc_data.topics import topics  # English prose that every Python installation carries

    yield from (text.lower() for text in topics.values())
    # Often enough that every word of the world becomes one token, with and without the space before it.
    yield from [f"{word}\n {word}" for word in (*PATCH_WORDS, *WORDS, *CAPTION_REQUESTS)] * 60
    for _ in range(4000):
        scene = sample_scene(rng, "train")
        yield caption(scene)
        for turn in (*image_turns(scene, rng, 4), text_turn(rng)):
            yield turn.question
            yield turn.answer
        pair = sample_scene(rng, "train", "shapes"), sample_scene(rng, "train", "shapes")
        yield compare_turn(*pair, rng).question


if __name__ == "__main__":
    train_tokenizer().save_pretrained(TOKENIZER_FOLDER)
