from __future__ import annotations

import json

import pytest

from benchmarks import compression
from student_train.compressors import compressor_modules
from student_train.pruning import operator_modules

QUICK = ["--repeats", "1", "--prompts", "1"]


def test_every_way_to_fewer_tokens_is_measured(tiny_models: str, capsys: pytest.CaptureFixture[str]) -> None:
    compression.main(["--models", tiny_models, "--vision-tokens", "9", *QUICK])
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    variants = body["variants"]
    assert list(variants) == ["none", *sorted(compressor_modules()), *sorted(operator_modules())]
    width, layers, bytes_a_number = 32, 2, 4
    whole = body["text_tokens"] + 36
    assert variants["none"]["kv_bytes"] == 2 * layers * width * bytes_a_number * whole
    for name, one in variants.items():
        assert one["vision_tokens_of_last_layer"] == (36 if name == "none" else 9)
        if one["kind"] == "compressor":
            assert one["vision_tokens"] == 9
            assert one["kv_bytes"] == 2 * layers * width * bytes_a_number * (whole - 27)
        if one["kind"] == "operator":
            assert one["vision_tokens"] == 36
            assert variants["none"]["kv_bytes"] > one["kv_bytes"] > variants["adaptive_pool"]["kv_bytes"] - 1
        assert name == "none" or one["flops"] < variants["none"]["flops"]
        assert all(value > 0 for value in one["seconds"])


@pytest.mark.usefixtures("small_real_shapes")
def test_real_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    compression.main(["--shapes", "real", "--vision-tokens", "4", "--layer", "1", *QUICK])
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert body["variants"]["none"]["vision_tokens"] == 16 and body["variants"]["mqt"]["vision_tokens"] == 4
