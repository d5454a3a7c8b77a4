"""Packed beside unpacked steps: the same rows, fewer positions."""

from __future__ import annotations

import json

import pytest

from benchmarks import packing


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    packing.main([*words, "--batch", "8", "--steps", "1", "--repeats", "1"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_packed_rows_have_less_padding(tiny_models: str, capsys: pytest.CaptureFixture[str]) -> None:
    body = run(capsys, "--models", tiny_models, "--methods", "sft,llava-kd")
    assert set(body["results"]) == {"sft", "llava-kd"}
    for one in body["results"].values():
        assert 0 < one["real tokens unpacked"] < one["real tokens packed"] <= 1
        assert one["packed / unpacked"] > 0 and one["µs a token packed"] > 0


@pytest.mark.usefixtures("small_real_shapes")
def test_real_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    body = run(capsys, "--shapes", "real", "--methods", "kd")
    assert body["results"]["kd"]["real tokens packed"] > 0
