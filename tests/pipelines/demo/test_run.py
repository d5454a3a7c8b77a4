"""The demo end to end, with a tenth of its rows and steps: what `make demo` prints and leaves must be there."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.demo.run import Recipe, quicker, run_demo
from pipelines.output_lock import alone
from pipelines.profiles import PROFILES
from teacher_cache.errors import KdcliError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict]:
    out = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    result = run_demo(out, seed=0, console=Console(file=printed, width=120), recipe=quicker(Recipe(), 0.1))
    return out, printed.getvalue(), result


def test_two_demos_in_one_folder(tmp_path: Path) -> None:
    with alone(tmp_path, "kdcli demo", "--out"), pytest.raises(KdcliError, match=r"kdcli demo \(host .* writes there"):
        run_demo(tmp_path, seed=0, console=Console(file=io.StringIO()))
    assert [one.name for one in tmp_path.iterdir()] == [".lock"]


def test_prints_defects_cache_and_scores(demo: tuple[Path, str, dict]) -> None:
    _, printed, result = demo
    assert set(result["scores"]) == {"teacher", "sft", "llava-kd"}
    for expected in ("image_corrupt", "fields/vision_hidden", "mean of families", "shapes_color", "report.html"):
        assert expected in printed


def test_in_a_log_file_progress_is_named_after_the_table_rows(demo: tuple[Path, str, dict]) -> None:
    _, printed, result = demo
    assert re.findall(r"^eval (.+?): \d+", printed, re.MULTILINE) == list(result["scores"])


def test_leaves_every_field_in_eight_shards(demo: tuple[Path, str, dict]) -> None:
    out, _, _ = demo
    for field in PROFILES["standard"]:
        assert len(list((out / "cache" / "fields" / field / "commits").glob("*.json"))) >= 8


def test_students_share_start_steps_and_rates(demo: tuple[Path, str, dict]) -> None:
    out, _, _ = demo
    cards = {name: json.loads((out / "runs" / name / "run.json").read_text()) for name in ("sft", "llava-kd")}
    shared = ("student", "max_steps", "learning_rate", "per_device_train_batch_size", "seed")
    sft, kd = ([{k: s["settings"][k] for k in shared} for s in cards[name]["stages"]] for name in ("sft", "llava-kd"))
    assert sft == kd
    assert [s["method"] for s in cards["llava-kd"]["stages"]] == ["llava-kd", "sft", "llava-kd"]


def test_report_is_one_file_that_asks_for_nothing(demo: tuple[Path, str, dict]) -> None:
    out, _, _ = demo
    page = (out / "report.html").read_text()
    assert "llava-kd" in page and "<svg" in page
    assert 'src="http' not in page and 'href="http' not in page
