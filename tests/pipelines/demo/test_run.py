"""The demo end to end, with a fifteenth of its rows and few steps: what `make demo` prints and leaves must be there."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from cli import main
from pipelines.ablate.grid import load_grid
from pipelines.capture.profiles import PROFILES
from pipelines.demo import run
from pipelines.demo.run import DEMO, DemoRecipe, run_demo
from pipelines.report.runs import RunRecord, read_runs
from pipelines.train.output_lock import alone
from teacher_cache.errors import KdcliError
from tests.pipelines.ablate.conftest import fork_cells
from tests.warm import Warm

SHORT = replace(DEMO, captions=24, train=40, heldout=7, batch_size=8, projector_steps=1, tuning_steps=3)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> tuple[Path, str, dict]:
    out = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        fork_cells(warm, patch)
        result = run_demo(out, seed=3, console=Console(file=printed, width=120), recipe=SHORT)
    return out, printed.getvalue(), result


def runs_of(out: Path) -> dict[str, RunRecord]:
    return {run.group: run for run in read_runs([out / "students"])}


def test_two_demos_in_one_folder(tmp_path: Path) -> None:
    with alone(tmp_path, "kdcli demo", "--out"), pytest.raises(KdcliError, match=r"kdcli demo \(host .* writes there"):
        run_demo(tmp_path, seed=0, console=Console(file=io.StringIO()))
    assert [one.name for one in tmp_path.iterdir()] == [".lock"]


def test_prints_defects_cache_and_scores(demo: tuple[Path, str, dict]) -> None:
    out, printed, result = demo
    assert list(result["scores"]) == list(json.loads((out / "scores.json").read_text())) == ["teacher", "sft", "kd"]
    for expected in ("image_corrupt", "fields/vision_hidden", "mean of families", "shapes_color", "report.html"):
        assert expected in printed


def test_says_what_is_wrong_and_what_came_of_it(demo: tuple[Path, str, dict]) -> None:
    """The sentence stands at the end of what is printed and before everything else on the page, and so does the cost."""
    out, printed, result = demo
    wrong = json.loads((out / "world" / "wrong_answers.json").read_text())
    told, page = result["lead"], (out / "report.html").read_text()
    assert f"{len(wrong):,} of " in printed and "training answers are wrong on purpose" in printed
    last = " ".join(printed.split())
    assert told.sentence in last and last.index(told.sentence) > last.index("mean of families")
    cost = dict(told.facts)["Cost"]
    assert re.fullmatch(
        r"training sft \d+ s, kd \d+ s, side by side; the cache took \d+ s, once for all students, [\d.]+ [kM]B", cost
    )
    captured = int(re.search(r"cache took (\d+) s", cost)[1])  # type: ignore[index]
    assert captured < result["seconds"] - 1, "the capture's own time, without what came behind it"
    assert page.index('class="lead"') < page.index('id="h-results"') and f"<dd>{cost}</dd>" in page
    assert "Over seeds" not in dict(told.facts), "known for the whole demo alone"


def test_in_a_log_file_progress_names_the_students(demo: tuple[Path, str, dict]) -> None:
    _, printed, _ = demo
    assert re.findall(r"^eval (.+?): \d+", printed, re.MULTILINE) == ["teacher"]
    assert set(re.findall(r"^\d/2 (\w+)/seed-3 heldout: ", printed, re.MULTILINE)) == {"sft", "kd"}


def test_leaves_every_field_in_eight_shards(demo: tuple[Path, str, dict]) -> None:
    out, _, _ = demo
    for field in PROFILES["standard"]:
        assert len(list((out / "cache" / "fields" / field / "commits").glob("*.json"))) >= 8


def test_students_share_start_and_steps_and_have_their_own_rates(demo: tuple[Path, str, dict]) -> None:
    out, _, _ = demo
    cards = {name: run.card["stages"] for name, run in runs_of(out).items()}
    shared = ("student", "max_steps", "per_device_train_batch_size", "seed")
    sft, kd = ([{k: s["settings"][k] for k in shared} for s in cards[name]] for name in ("sft", "kd"))
    assert sft == kd and sft[0]["seed"] == 3
    rates = {name: [stage["settings"]["learning_rate"] for stage in stages] for name, stages in cards.items()}
    assert rates == {"sft": [1e-3, 5e-4], "kd": [1e-3, 1e-3]}
    assert [s["method"] for s in cards["kd"]] == ["sft", "kd"] and [s["method"] for s in cards["sft"]] == ["sft"] * 2


def test_the_distilled_student_never_sees_an_answer(demo: tuple[Path, str, dict]) -> None:
    out, _, _ = demo
    stages = runs_of(out)["kd"].stages
    assert [stage.terms for stage in stages] == [("loss", "loss/reg"), ("loss", "loss/res")]


def test_its_grid_is_one_that_kdcli_ablate_takes(demo: tuple[Path, str, dict]) -> None:
    out, _, _ = demo
    grid = load_grid(out / "grid.toml")
    assert grid.baseline == "sft" and [one.name for one in grid.variants] == ["sft", "kd"]


def test_report_is_one_file_that_asks_for_nothing(demo: tuple[Path, str, dict]) -> None:
    out, _, _ = demo
    page = (out / "report.html").read_text()
    assert "kd/seed-3" in page and "<svg" in page
    assert 'src="http' not in page and 'href="http' not in page


def test_flags_reach_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, DemoRecipe]] = []
    monkeypatch.setattr(run, "run_demo", lambda out, seed, console, recipe: asked.append((seed, recipe)))
    for flags in ([], ["--wrong-answers", "0", "--seed", "4"]):
        done = CliRunner().invoke(main, ["demo", "--out", str(tmp_path), *flags])
        assert done.exit_code == 0, done.output
    assert asked == [(0, DEMO), (4, replace(DEMO, wrong_answers=0.0))]
    refused = CliRunner().invoke(main, ["demo", "--out", str(tmp_path), "--wrong-answers", "40"])
    assert refused.exit_code == 2 and "0<=x<=1" in refused.output
