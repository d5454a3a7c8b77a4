"""Three tokenizers of real shape, with what every template wants: the demo's, one like Qwen's and one like Llama's.

The last two are trained until every word of ``WORDS`` is one token, so that what a test spells does not depend on the order of merges.
"""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.demo_training.tokenizer import load_tokenizer
from teacher_cache.preparing.templates import QWEN_SYSTEM, V1_SYSTEM

WORDS = f"{V1_SYSTEM} {QWEN_SYSTEM} USER: ASSISTANT: What is it? A red square. Be brief. one two three four yes system user assistant"
PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)
CHAT_ML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    + PARTS
    + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 2's, in short: the answer's own space is written by the template, and one more stands before the end.
LLAMA_CHAT = (
    "{% for message in messages %}{{ bos_token + '[INST] ' if message['role'] == 'user' else ' ' }}"
    + PARTS
    + "{{ ' [/INST]' if message['role'] == 'user' else ' ' + eos_token }}{% endfor %}"
)


def demo() -> PreTrainedTokenizerFast:
    """The shipped one, given the tokens of both templates."""
    tokenizer = load_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["</s>", "<|im_start|>", "<|im_end|>"]}, replace_extra_special_tokens=False
    )
    return tokenizer


def qwen_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE, numbers by digit, ChatML, no first token."""
    bpe = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        min_frequency=0,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"],
        show_progress=False,
    )
    bpe.train_from_iterator([WORDS, "\n".join(WORDS.split()), "\n\n"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<image>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_ML
    return tokenizer


def llama_like() -> PreTrainedTokenizerFast:
    """Sentence-piece BPE: a space belongs to the word behind it, unknown characters are bytes, ``<s>`` begins every text."""
    letters = sorted({*WORDS, "▁"} - {" "})
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        min_frequency=0,
        initial_alphabet=letters,
        special_tokens=["<unk>", "<s>", "</s>", "<image>"],
        show_progress=False,
    )
    # Every word with and without a space before it.
    bpe.train_from_iterator([WORDS, *WORDS.split()], trainer)
    description = json.loads(bpe.to_str())
    vocabulary = description["model"]["vocab"]
    for value in range(256):
        vocabulary[f"<0x{value:02X}>"] = len(vocabulary)
    bpe = Tokenizer.from_str(json.dumps(description))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        additional_special_tokens=["<image>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = LLAMA_CHAT
    return tokenizer
