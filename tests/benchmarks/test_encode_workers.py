from __future__ import annotations

import json

import pytest

from benchmarks import encode_workers


@pytest.mark.usefixtures("small_real_shapes")
def test_ratios_and_what_encoding_costs_by_number_of_threads(capsys: pytest.CaptureFixture[str]) -> None:
    encode_workers.main(["--rows", "6", "--width", "64", "--ms-per-row", "1", "--repeats", "1", "--workers", "1", "2"])
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert body["tokens"]["vision"] == 16 and body["rows"] == 6
    assert body["bare"]["ratio to bare"] == 1 and "waited for encoding" not in body["bare"]
    for workers in ("1 workers", "2 workers"):
        assert body[workers]["ratio to bare"] > 0 and body[workers]["encoding, CPU ms a row"][0] > 0
