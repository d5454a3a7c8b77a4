from __future__ import annotations

import json

import pytest

from benchmarks import capture


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_prints_ratios_what_encoding_costs_and_where_the_time_goes(
    tiny_models: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capture.main(["--models", tiny_models, "--rows", "24", "--repeats", "1"])
    body = last_line(capsys)
    assert body["benchmark"] == "capture" and body["rows"] == 24
    assert set(body["ratio_to_bare"]) == {"samples only", "compact", "standard", "exact"}
    assert all(low <= middle <= high for low, middle, high in body["rows_per_second"].values())
    inside = body["ms_per_row_inside"]
    assert {"teacher forward", "head product + top-k", "encode fields", "write"} <= set(inside["standard"])
    assert "teacher forward" not in inside["samples only"]
    cost = body["encoding_ms_per_row"]["standard"]
    fields = ("response_topk", "vision_topk", "response_hidden", "vision_hidden", "affinity")
    assert cost["encode"] == pytest.approx(sum(cost[name] for name in fields), rel=0.01)
    assert cost["encode / forward, CPU"] == pytest.approx(cost["encode"] / cost["forward, CPU"], rel=0.01)


@pytest.mark.usefixtures("small_real_shapes")
def test_real_shapes_run_when_they_are_narrow(capsys: pytest.CaptureFixture[str]) -> None:
    capture.main(["--shapes", "real", "--rows", "4", "--repeats", "1"])
    body = last_line(capsys)
    assert body["models"]["vocabulary"] == 5000 and body["models"]["vision_tokens"] == 16
    assert "random weights" in body["models"]["notes"]
