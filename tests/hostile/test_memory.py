"""Out of memory: one line that names what was too large and the setting, committed shards are kept. The errors are torch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import cli
from teacher_cache.teachers.transformers import TransformersTeacher


def too_much(*_: Any) -> None:
    torch.empty(1 << 50)


def test_a_teacher_without_memory(
    tiny_teacher: Path, world_json: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first shard stands, the second is named; a machine with more finishes the same cache."""
    data = ["--data", str(world_json.captions), "--image-root", str(world_json.images), "--template", "plain"]
    wanted = [
        "--teacher",
        str(tiny_teacher),
        "--shards",
        "2",
        "--fields",
        "response_topk",
        "--k",
        "4",
        "--device",
        "cpu",
    ]
    command = ["cache-teacher", *data, *wanted, "--out", str(tmp_path / "cache"), "--workers", "1"]
    commits = tmp_path / "cache" / "fields" / "response_topk" / "commits"
    hidden = TransformersTeacher.hidden

    def once(self: Any, batch: Any) -> torch.Tensor:
        if list(commits.glob("*.json")):
            too_much()
        return hidden(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersTeacher, "hidden", once)
        done = CliRunner().invoke(cli.main, command)
    last = done.output.strip().splitlines()[-1]
    assert done.exit_code == 1 and last.startswith("Error: "), done.output
    for word in (
        "shard 00000",
        "out of memory with a batch of",
        "tokens",
        "--batch-tokens",
        "committed shards are kept",
    ):
        assert word in last, last
    assert len(list(commits.glob("*.json"))) == 1
    assert CliRunner().invoke(cli.main, command).exit_code == 0 and len(list(commits.glob("*.json"))) == 2


def test_any_command_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.train.method_table as table

    for name in dir(table):
        if callable(getattr(table, name)) and getattr(getattr(table, name), "__module__", "") == table.__name__:
            monkeypatch.setattr(table, name, too_much)
    done = CliRunner().invoke(cli.main, ["methods"])
    assert done.exit_code == 1 and done.output.startswith("Error: out of memory"), done.output
