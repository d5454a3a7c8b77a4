from __future__ import annotations

import json

import pytest

from benchmarks import capture


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_prints_a_ratio_and_where_the_time_goes(tiny_models: str, capsys: pytest.CaptureFixture[str]) -> None:
    capture.main(["--models", tiny_models, "--rows", "16", "--repeats", "2"])
    body = last_line(capsys)
    assert body["benchmark"] == "capture" and body["rows"] == 16 and body["target"] == 0.9
    assert set(body["ratio_to_bare"]) == {"default", "and top-k", "all six"}
    assert all(low <= middle <= high for low, middle, high in body["rows_per_second"].values())
    inside = body["ms_per_row_inside"]["all six"]
    assert {"teacher forward", "head product + top-k", "Gram matrices", "encode fields", "write"} <= set(inside)


@pytest.mark.usefixtures("small_real_shapes")
def test_real_shapes_run_when_they_are_narrow(capsys: pytest.CaptureFixture[str]) -> None:
    capture.main(["--shapes", "real", "--rows", "4", "--repeats", "1"])
    body = last_line(capsys)
    assert body["models"]["vocabulary"] == 5000 and body["models"]["vision_tokens"] == 16
    assert "random weights" in body["models"]["notes"]
