"""The scale benchmarks at a few rows: that they measure what they say and write tables of it, never how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import executors, scale, scale_reading, scale_tables
from benchmarks.memory import watched
from benchmarks.scale_mixtures import PICTURES, long_rows, tiny_rows, write_mixture, write_pictures
from teacher_cache.records import Sample
from teacher_cache.sources import DataSpec, open_source

FILL = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'a = bytearray({0} << 20); import time; time.sleep(1)'])"


def test_watched_sees_the_memory_of_children() -> None:
    small, large = (watched([sys.executable, "-c", FILL.format(mib)]) for mib in (1, 200))
    assert 150 < large.largest_mib - small.largest_mib < 250
    assert large.together_mib > large.largest_mib and large.seconds >= 1
    with pytest.raises(subprocess.CalledProcessError):
        watched([sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.parametrize(("kind", "shortest"), [(tiny_rows, 10), (long_rows, 20)])
def test_mixtures_are_readable_to_the_last_row(kind, shortest: int, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures")
    for name in ("one.json", "two.json"):
        write_mixture(kind(300), tmp_path / name)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    source = open_source(DataSpec("sft", str(tmp_path / "one.json"), image_root=str(tmp_path / "pictures")))
    groups = source.scan(100)
    rows = [row for group in groups for row in source.read(group)]
    assert len(rows) == 300 and all(isinstance(row, Sample) for row in rows)
    assert 0 < sum(group.images for group in groups) < 300
    assert min(sum(len(turn.text) for turn in row.turns) for row in rows) >= shortest - 8
    assert len(list((tmp_path / "pictures").iterdir())) == PICTURES


def test_reading_counts_every_row(tiny_cache: Path, tiny_student: Path, capsys: pytest.CaptureFixture) -> None:
    scale_reading.main([str(tiny_cache), str(tiny_student), "--rows", "24"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["rows"] == 31 and said["streamed_rows"] == 16 and said["rows_per_second"] > 0
    assert said["mib_at_most"] >= said["mib_before"] > 0


def test_finished_stages_are_kept(tmp_path: Path) -> None:
    bench = scale.Bench(tmp_path, "teacher", shards=2, workers=1)
    bench.once("10", "capture", lambda: {"seconds": 1.5})
    again = scale.Bench(tmp_path, "teacher", shards=2, workers=1)
    again.once("10", "capture", lambda: pytest.fail("measured twice"))
    assert again.results == {"10": {"capture": {"seconds": 1.5}}}


def test_a_whole_command_and_its_work_alone(tiny_models: str, tmp_path: Path) -> None:
    teacher = f"null:{tiny_models}/teacher,ms_per_row=20"
    bench = executors.Bench(tmp_path, teacher, rows=12, shards=4, ray_address=None)
    seconds = bench.run("one worker", 1)
    (work,) = bench.work_seconds["one worker"]
    assert 0.2 < work < seconds  # 12 rows of 20 ms


def saved(folder: Path) -> Path:
    """Results as the benchmarks save them, with round numbers."""
    card = {"machine": "2-core test", "date": "2026-11-26"}
    stage = {"seconds": 10.0, "mib": 400.0, "mib_together": 900.0}
    reading = {
        "open_seconds": 0.5,
        "open_mib": 3.0,
        "rows_per_second": 1000.0,
        "mib_before": 400.0,
        "mib_at_most": 450.0,
    }
    one = {"capture": stage, "train side": {**stage, **reading}, "files": {}}
    planned = {"rows": 665_298, "kdcli plan": stage, "files": {"json_bytes": 10**9}}
    inside = dict.fromkeys(("encode fields", "pack", "write", "hash + commit", "encode samples", "finite check"), 1.0)
    bodies = {
        "scale": {"sizes": {"75": one, "1200": one}, "planned": planned, "shards": 512, "workers": 2},
        "capture": {"ms_per_row_inside": {"standard": {**inside, "prepare (own thread)": 4.0}}},
        "overhead": {"totals": {"standard, with samples": {"tar": 100_000}}},
        "executors": {"ratios": {"two workers / one, work alone": 1.9}},
    }
    for name, body in bodies.items():
        (folder / f"{name}-test.json").write_text(json.dumps({"machine": card, **body}))
    return folder


def test_tables_follow_the_formulas(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    results = scale_tables.read_results(saved(tmp_path))
    cost = scale_tables.costs(results)
    assert (cost.prepare_ms, cost.write_ms, cost.row_bytes) == (4.0, 6.0, 200_000)
    rate = 10 * scale_tables.TOKENS_PER_ROW  # ten rows a second and GPU
    said = scale_tables.one_capture(cost, rate, 512, rows=512 * 1000, gpus=8)
    assert said["teacher, minutes"] == f"{64 * 100 / 60:.1f}" and said["shards a GPU"] == "64"
    assert (said["cores a GPU, preparing"], said["cores a GPU, encoding and writing"]) == ("0.04", "0.06")
    assert said["MB/s written, all GPUs"] == "16" and said["TB in all"] == "0.10"
    assert said["commits a second, mean"] == f"{512 * 6 / 6400:.3f}"
    scale_tables.print_tables(rate, 30, tmp_path)
    out = capsys.readouterr().out
    assert "1,200 rows" in out and "kdcli plan" in out and "1.900" in out and "92,160" in out
    (tmp_path / "scale-test.json").unlink()
    scale_tables.print_tables(rate, 30, tmp_path)
    out = capsys.readouterr().out
    assert "python -m benchmarks.scale --save" in out and "kdcli plan" not in out and "92,160" in out
