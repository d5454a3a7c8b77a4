"""The benchmark of both backends on the tiny model: that it runs and reports, never how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import backends
from tests.contracts.vllm_rows import BOUND, build_teacher


def test_both_backends_in_one_run(tmp_path: Path, tiny_student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_teacher(tmp_path / "teacher")
    (tmp_path / "student_start").symlink_to(tiny_student)
    backends.main(["--models", str(tmp_path), "--rows", "12", "--repeats", "1"])
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(body["pairs"]) == {"standard, hidden", "compact, hidden", "compact, logprobs"}
    for name in ("standard, hidden", "compact, hidden"):
        assert max(body["pairs"][name]["largest_difference"].values()) < BOUND
    assert all(one["tokens_per_second"]["vllm"] > 0 for one in body["pairs"].values())
