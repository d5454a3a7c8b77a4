"""``import kdcli`` and ``python -m kdcli``: ten documented names, nothing heavy until one is used, the program; the two whole jobs."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kdcli
from teacher_cache.errors import KdcliError

ROOT = Path(__file__).parents[2]


def test_ten_names_each_documented_here_and_on_the_page() -> None:
    page = (ROOT / "docs" / "library.md").read_text()
    assert len(kdcli.__all__) == 10 and set(kdcli.__all__) <= set(dir(kdcli))
    for name in kdcli.__all__:
        assert inspect.getdoc(getattr(kdcli, name)) and re.search(rf"`{name}\b", page), name
    for name in kdcli.losses.__all__:
        assert inspect.getdoc(getattr(kdcli.losses, name)) and name in (kdcli.losses.__doc__ or ""), name
    with pytest.raises(AttributeError, match="no attribute 'open'; it has Cache, "):
        _ = kdcli.open


def test_importing_loads_nothing_heavy() -> None:
    program = (
        "import sys, kdcli; print(sorted({'torch', 'transformers', 'numpy', 'pyarrow', 'click'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("own", [False, True])
def test_the_module_is_the_program(own: bool, tmp_path: Path) -> None:
    """In the source tree too, and in a folder where a user has a ``cli.py``."""
    (tmp_path / "cli.py").write_text("raise SystemExit('not this one')")
    told = {"cwd": tmp_path if own else ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT) if own else ""}}
    words = [sys.executable, "-m", "kdcli", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, **told)
    assert done.stdout.startswith("Usage: kdcli [OPTIONS] COMMAND") and "cache-teacher" in done.stdout


def test_capture_and_train_are_the_commands(
    world: Any, tiny_teacher: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tars, indexes and weights, byte by byte."""
    from click.testing import CliRunner

    from cli import main

    monkeypatch.chdir(tmp_path)
    told = {"shards": 2, "workers": 1, "fields": ("response_hidden",)}
    codec = {"response_hidden": {"codec": "fp32"}}
    rows = kdcli.capture(
        str(tiny_teacher), world.train, "by-hand", limit=6, field_params=codec, warn=lambda line: None, **told
    )["rows"]
    assert rows == 6
    Path("kd.toml").write_text('[fields.response_hidden]\ncodec = "fp32"\n')
    words = (
        f"cache-teacher --teacher {tiny_teacher} --data {world.train} --out by-command --limit 6 --shards 2 --workers 1"
    )
    done = CliRunner().invoke(main, [*words.split(), "--fields", "response_hidden"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert sums(Path("by-hand")) == sums(Path("by-command"))

    result = kdcli.train("by-hand", "kd", str(tiny_student), "run-1", stages="DFT", max_steps=2, say=lambda line: None)
    words = f"train-student --cache by-command --method kd --student {tiny_student} --output-dir run-2 --stages DFT --max-steps 2"
    done = CliRunner().invoke(main, [*words.split(), "--report-to", "none", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    models = [Path(one["model"]) / "model.safetensors" for one in (result, json.loads(done.stdout))]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_jobs_refuse_in_one_line(tiny_teacher: Path, tmp_path: Path) -> None:
    from teacher_cache.sources import DataSpec

    with pytest.raises(KdcliError, match="stand in each DataSpec"):
        kdcli.capture(str(tiny_teacher), DataSpec("sft", "x.json"), str(tmp_path / "out"), limit=3)
    with pytest.raises(KdcliError, match=r"capture: unknown key.* shard"):
        kdcli.capture(str(tiny_teacher), "x.json", str(tmp_path / "out"), shard=3)


def sums(cache: Path) -> dict[str, str]:
    files = sorted(path for path in cache.rglob("*") if path.is_file() and path.suffix in (".tar", ".parquet"))
    assert files
    return {str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
