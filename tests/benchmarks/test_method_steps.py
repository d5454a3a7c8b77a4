from __future__ import annotations

import json

import pytest

from benchmarks import method_steps
from benchmarks.method_steps import CASES, METHODS, POOLED_SFT, SFT
from student_train.methods import method_modules


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    method_steps.main([*arguments, "--steps", "1", "--repeats", "1"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_method_beside_its_sft(tiny_models: str, capsys: pytest.CaptureFixture[str]) -> None:
    body = run(capsys, "--models", tiny_models, "--batch", "6")
    flops, found = body["gflop_a_step"], body["ratios"]
    assert set(flops) == set(body["seconds_a_step"]) == set(CASES) and set(found) == set(CASES) - {SFT, POOLED_SFT}
    assert flops[POOLED_SFT] < flops[SFT] and flops["em-kd 512 columns"] < flops["em-kd exact"]
    assert all(flops[name] > flops[CASES[name].base] for name in found if not name.startswith("epic"))
    for name, one in found.items():
        assert one["measured"] > 0 and one["target"] == CASES[name].target
        assert one["operations"] == pytest.approx(flops[name] / flops[CASES[name].base], rel=0.05)


@pytest.mark.usefixtures("small_real_shapes")
def test_real_shapes_run_when_they_are_narrow(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = run(capsys, "--shapes", "real", "--batch", "2", "--only", "em-kd", "epic-tcd")
    assert set(body["ratios"]) == {name for name in CASES if name.startswith("em-kd")} | {"epic-tcd"}


def test_every_method_of_the_registry_is_timed() -> None:
    assert set(METHODS) == set(method_modules()) - {"sft"}
