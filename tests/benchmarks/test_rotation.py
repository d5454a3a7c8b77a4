from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import rotation
from benchmarks.demo_training.tokenizer import load_tokenizer


def test_outlying_dimensions_are_what_version_2_is_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text model two of whose dimensions tower over the others, as those of released models do."""
    tokenizer = load_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight[:2] = 40.0
    for one in (tokenizer, model):
        one.save_pretrained(tmp_path / "model")
    (tmp_path / "text.md").write_text("A red square is left of a blue circle. " * 60)
    words = ["rotation", "--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.md"), "--tokens", "256"]
    monkeypatch.setattr("sys.argv", words)
    rotation.main()
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    kl = {(one["codec"], one["version"], one["record"]): one["kl"] for one in body["results"]}
    assert body["rows"] == 256 and body["dimensions over the median"][0] > 10
    assert all(kl[codec, 2, 64] < kl[codec, 1, 64] / 4 for codec in ("int8", "int4"))
