"""Slurm arrays: the scripts, their submission, and a whole capture by a stand-in for ``sbatch`` that runs them here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import main
from pipelines.capture.cache_teacher import capture
from pipelines.capture.executors.slurm import SlurmJob
from pipelines.capture.worker import CaptureRequest
from teacher_cache.errors import KdcliError
from teacher_cache.planning.plan_file import parse_plan
from tests.exhaustive import of_all

SBATCH = """#!/bin/bash
# Runs a script at once, each task of an array with its number, as Slurm would on some machine at some time.
set -euo pipefail
echo "$@" >> "$SBATCH_CALLS"
script="${!#}"
tasks=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)$/\\1/p' "$script")
for task in $(seq 0 "${tasks:-0}"); do
  SLURM_ARRAY_TASK_ID=$task bash "$script" >> "$SBATCH_CALLS.log" 2>&1
done
echo "$(wc -l < "$SBATCH_CALLS");cluster"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ``sbatch`` on the PATH; the file in which it writes down how it was called."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(SBATCH)
    program.chmod(0o755)
    calls = tmp_path / "calls"
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_CALLS", str(calls))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return calls


@pytest.mark.parametrize("tasks", of_all([1, 2], 1))
def test_a_capture_by_an_array(
    tasks: int,
    slurm: Path,
    alone: Path,
    cache_files: Callable[[Path], dict[str, bytes]],
    make_request: Callable[..., CaptureRequest],
    own_modules: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The flags as a user gives them, a kd.toml and modules of the user's own beside them, relative paths: the cache of one process.
    Two tasks are exhaustive; that parts of the shards make the whole is tested below."""
    request = make_request("cache")
    monkeypatch.chdir(own_modules(tmp_path / "work"))
    lines = [
        f"[fields.{name}]\n" + "".join(f"{k} = {v!r}\n" for k, v in p.items())
        for name, p in request.field_params.items()
    ]
    (tmp_path / "work" / "kd.toml").write_text(
        f'[capture]\nexecutor = "slurm"\nslurm_tasks = {tasks}\n' + "\n".join(lines)
    )
    flags = [
        "--teacher",
        request.teacher.id,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--out",
        "cache",
        "--shards",
        "5",
    ]
    for spec in request.data:
        flags += ["--data", spec.path, "--part", spec.part, "--template", spec.template]
        flags += ["--image-root", spec.image_root or "."]
    flags += ["--fields", ",".join(request.settings.fields), "--batch-tokens", "1024", "--workers", "1"]
    result = CliRunner().invoke(main, ["cache-teacher", *flags, "--slurm-options", "--partition=gpu --time=1:00"])
    assert result.exit_code == 0, result.output
    assert f"1 prepares, then array 2 with {tasks} tasks" in result.output
    first, second = slurm.read_text().splitlines()
    assert (
        first == "--parsable slurm/prepare.sbatch" and second == "--parsable --dependency=afterok:1 slurm/shards.sbatch"
    )
    script = (tmp_path / "work" / "slurm" / "shards.sbatch").read_text()
    assert "#SBATCH --partition=gpu\n#SBATCH --time=1:00\n" in script and "--slurm" not in script
    ours, theirs = cache_files(tmp_path / "work" / "cache"), cache_files(alone)
    data = {name for name in theirs if "/data/" in name}
    assert data and {name: ours.get(name) for name in data} == {name: theirs[name] for name in data}


def test_what_would_be_submitted(tmp_path: Path) -> None:
    flags = ["--teacher", "t", "--data", "d.json", "--out", "c", "--executor", "slurm", "--slurm-tasks", "64"]
    result = CliRunner().invoke(main, ["cache-teacher", *flags, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "#SBATCH --array=0-63\n" in result.output and '--part-of-shards "$SLURM_ARRAY_TASK_ID/64"' in result.output
    assert "--teacher t --data d.json --out c --executor local --prepare-only" in result.output
    assert "sbatch --dependency=afterok:$prepare" in result.output and not Path("slurm").exists()


def test_no_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KdcliError, match=r"sbatch is not on this machine.*--dry-run"):
        SlurmJob(["kdcli"], 2, (), tmp_path / "slurm", tmp_path).submit()


def test_slurm_refuses(slurm: Path, tmp_path: Path) -> None:
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/bash\necho 'invalid partition specified: gpus' >&2\nexit 1\n")
    with pytest.raises(KdcliError, match=r"sbatch refuses .*prepare.sbatch: invalid partition specified: gpus"):
        SlurmJob(["kdcli"], 2, (), tmp_path / "slurm", tmp_path).submit()


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [(0, (), "--slurm-tasks must be at least 1"), (1, ("gpu",), "write options as --name=value, got 'gpu'")],
)
def test_what_no_array_can_be(tasks: int, options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(KdcliError, match=message):
        SlurmJob(["kdcli"], tasks, options, tmp_path, tmp_path)


def test_parts_of_the_shards(make_request: Callable[..., CaptureRequest], tmp_path: Path) -> None:
    """Prepared by one, made by two others: each makes its own, and the last finds nothing to do."""
    from dataclasses import replace

    request = make_request(tmp_path / "cache")
    prepared = capture(replace(request, prepare_only=True))
    assert parse_plan((tmp_path / "cache" / "manifest.json").read_bytes(), "manifest").slices
    done = [prepared]
    done += [capture(replace(request, part_of_shards=(number, 2))) for number in (1, 0)]
    assert [one["columns"]["samples"]["done"] for one in done] == [0, 2, 5]
    with pytest.raises(KdcliError, match="--part-of-shards 2/2: the number must be from 0 to 1"):
        replace(request, part_of_shards=(2, 2))
    result = CliRunner().invoke(
        main, ["cache-teacher", "--teacher", "t", "--data", "d", "--out", "c", "--part-of-shards", "x"]
    )
    assert result.exit_code and "--part-of-shards: expected I/N, e.g. 3/64, got 'x'" in result.output
