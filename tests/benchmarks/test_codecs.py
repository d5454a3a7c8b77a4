from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import codec_rows, codecs, text_corpus
from benchmarks.demo_training.tokenizer import load_tokenizer


def test_a_released_model_is_measured_on_documentation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model: every target is judged by a configuration that its bytes allow, and finer steps are nearer to the teacher."""
    tokenizer = load_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.3, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    for one in (tokenizer, model):
        one.save_pretrained(tmp_path)
    for name, value in {"TEXT_CALIBRATION": 2, "TEXT_TEST": 1, "RELEASED_STEPS": (0.4, 0.1)}.items():
        monkeypatch.setattr(codecs, name, value)
    for name in ("RELEASED_AT_BYTES", "RELEASED_HEADS"):
        monkeypatch.setattr(codecs, name, ())
    monkeypatch.setattr(codec_rows, "PIECE", 48 + codec_rows.PROMPT)
    monkeypatch.setattr("sys.argv", ["codecs", "--only-text", "--text-model", str(tmp_path)])
    codecs.main()
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    (one,) = (part for part in body.values() if isinstance(part, dict) and "targets" in part)
    assert one["rows"] == 48 and one["calibration rows"] == 96
    fine, coarse = (one["results"][f"top-8 + sketch Δ={step}"] for step in (0.1, 0.4))
    assert fine["bytes"] > coarse["bytes"] and fine["kl"] < coarse["kl"] and fine["soft_kl"] < coarse["soft_kl"]
    for name in ("share_of_bf16", "half_of_distillkit", "least_bytes", "temperature_4"):
        told = one["targets"][name]
        assert "best" not in told or told["bytes"] <= told["bytes_allowed"]
        assert "best" in told or not told["met"]


def test_pieces_of_documentation_have_an_order_of_their_own() -> None:
    texts = text_corpus.english_texts()
    assert texts == text_corpus.english_texts() and len(set(texts)) == len(texts) > 20
    pieces = text_corpus.english_pieces(lambda text: list(text.encode()), 600, 9)
    assert [bytes(one.tolist()) for one in pieces[:3]] == [texts[0].encode()[at : at + 600] for at in (0, 600, 1200)]
    with pytest.raises(ValueError, match="not 1000000"):
        text_corpus.english_pieces(lambda text: [1] * 30, 10, 10**6)
