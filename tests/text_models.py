"""Tiny language models of text alone, with the demo's tokenizer, and rows for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

PADDING_ROWS = 7
KINDS = ("llama", "qwen2", "gpt2", "gpt_neox")


def text_config(kind: str, vocabulary: int, width: int, layers: int, tied: bool) -> Any:
    from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

    if kind == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=2, n_positions=512, initializer_range=0.2,
            tie_word_embeddings=tied, bos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    made = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gpt_neox": GPTNeoXConfig}[kind]
    return made(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        **({} if kind == "gpt_neox" else {"num_key_value_heads": 2}),
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=None,
    )


def build_text_folder(
    folder: Path,
    kind: str = "llama",
    width: int = 32,
    layers: int = 2,
    seed: int = 1,
    tied: bool = True,
    chat: bool = True,
    pad: bool = True,
) -> Path:
    """A stock ``AutoModelForCausalLM`` folder with random weights and ``PADDING_ROWS`` rows of its head beyond the tokenizer.

    chat: its tokenizer has the demo's chat template (base models have none). pad: it has a pad token.
    """
    from transformers import AutoModelForCausalLM

    from benchmarks.demo_training.tokenizer import load_tokenizer

    tokenizer = load_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    config = text_config(kind, len(tokenizer) + PADDING_ROWS, width, layers, tied)
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id if pad else None
    if not pad:
        tokenizer.pad_token = None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: int = 40, seed: int = 0) -> Path:
    """Messages jsonl: little questions with an answer each, some with a system turn or a second exchange."""
    from pipelines.demo.text_turns import text_turn

    rng = random.Random(seed)
    lines = []
    for number in range(rows):
        turns = [text_turn(rng) for _ in range(1 + number % 2)]
        messages = [{"role": "system", "content": "Be brief."}] if number % 5 == 0 else []
        for turn in turns:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        lines.append(json.dumps({"id": f"row-{number}", "messages": messages}))
    file.write_text("\n".join(lines) + "\n")
    return file
