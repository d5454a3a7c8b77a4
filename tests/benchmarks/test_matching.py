from __future__ import annotations

import json

import pytest

from benchmarks import matching


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    matching.main([*arguments, "--steps", "2", "--repeats", "1"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def check(body: dict, tokens: int) -> None:
    columns = [str(count) for count in matching.COLUMNS[body["shapes"]]]
    assert list(body["times"]) == ["exact", *columns] and list(body["quality"]) == columns
    assert body["student_vision_tokens"] == tokens and body["images"] >= 4
    assert all(0 < one["share"] < 1 for one in body["times"].values())
    for one in body["quality"].values():
        assert 1 <= one["cost / optimum, median"] <= one["cost / optimum, worst"] < 1.5


def test_times_and_quality_of_every_variant(tiny_models: str, capsys: pytest.CaptureFixture[str]) -> None:
    check(run(capsys, "--models", tiny_models, "--batch", "6"), tokens=9)


@pytest.mark.usefixtures("small_real_shapes")
def test_real_shapes_run_when_they_are_narrow(capsys: pytest.CaptureFixture[str]) -> None:
    body = run(capsys, "--shapes", "real", "--batch", "4")
    check(body, tokens=4)
    assert body["quality"]["8192"]["equal pairs"] == 1  # more columns than there are: the exact cost
