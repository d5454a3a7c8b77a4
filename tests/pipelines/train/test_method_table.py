"""``kdcli methods``: every method with what serves it, and below it what is not offered and why."""

from __future__ import annotations

import json

from click.testing import CliRunner

import cli
from pipelines.train.method_table import LATER, LIVE
from student_train.methods import method_modules
from teacher_cache.fields import field_kinds


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.main, ["methods", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_the_table_names_every_method_and_what_is_missing() -> None:
    shown = run()
    lines = shown.splitlines()
    for name, module in method_modules().items():
        assert any(line.startswith(f"| {name} ") and module.PAPER in line for line in lines)
    for one in (*LIVE, *LATER):
        assert any(line.startswith(f"- {one.name}, {one.paper}: {one.reason}") for line in lines)
        assert not one.instead or one.instead in method_modules()


def test_every_loss_term_is_explained_with_its_methods() -> None:
    lines = run().splitlines()
    assert "- rel: relation: 1 − cosine of the Gram matrices of vision logits (llava-kd)" in lines
    vis = [line for line in lines if line.startswith("- vis: ")]
    assert [line.rpartition("(")[2] for line in vis] == ["llava-kd)", "align-kd)"], "two meanings, two lines"
    body = {one["method"]: one for one in json.loads(run("--json"))["methods"]}
    assert body["em-kd"]["terms"].keys() >= {"sup", "rld", "vsd", "vlad", "reg"}


def test_as_json() -> None:
    body = json.loads(run("--json"))
    methods = {one["method"]: one for one in body["methods"]}
    assert set(methods) == set(method_modules())
    align = methods["align-kd"]
    assert dict(zip(align["needs"], align["served_by"]))["text_vision_attention"] == "attention"
    assert align["presets"] == ["default", "paper"] and align["stages"] == "DPT,DFT"
    known = {*field_kinds(), "the student itself"}
    assert all(set(served.split(" or ")) <= known for one in methods.values() for served in one["served_by"])
    assert {one["name"] for one in body["later"]} == {"llava-mod", "sparsevlm", "voco"}
    assert len(body["needs_live_teacher"]) == 3
