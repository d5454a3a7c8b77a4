"""Training on several processes (gloo): DDP and FSDP2 make the steps of one process, and another number continues a run.

FSDP2 is started by torchrun once, everything else as torchrun's processes without it (``tests.warm``).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.settings import Settings
from pipelines.train.train_student import train
from student_train.config import StageSettings, TrainSettings
from tests.exhaustive import of_all
from tests.warm import Child, Warm, kdcli

STEPS = 6
FLAGS = ("student", "output_dir", "max_steps", "save_steps", "per_device_train_batch_size", "report_to")
FLAGS += ("gradient_accumulation_steps", "compressor")


def command(cache: Path, train: TrainSettings, stages: str, method: str = "llava-kd") -> list[str]:
    """A run as a command line."""
    line = ["train-student", "--method", method, "--cache", str(cache), "--stages", stages]
    for name in FLAGS:
        if getattr(train, name) is not None:
            line += [f"--{name.replace('_', '-')}", str(getattr(train, name))]
    for name in ("schedule", "select"):
        line += [
            word for term, text in (getattr(train, name) or {}).items() for word in (f"--{name}", f"{term}={text}")
        ]
    return line + [f"--{name}" for name in ("fsdp", "bf16") if getattr(train, name)]


def torchrun(processes: int, line: list[str], folder: Path) -> None:
    """A run of so many processes, started where a user has modules with names of ours."""
    for name in ("cli.py", "pipelines.py", "teacher_cache.py"):
        (folder / name).write_text(f"raise SystemExit('the user\\'s own {name} was imported')\n")
    program = Path(sys.executable).with_name("kdcli")
    launch = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch += ["--no-python", str(program), *line]
    done = subprocess.run(launch, cwd=folder, env=own, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def killed_at(log: Path, lines: int, ranks: list[Child]) -> None:
    """SIGKILL to all processes once ``log`` has so many lines."""
    try:
        while not (log.is_file() and log.read_text().count("\n") >= lines):
            assert ranks[0].poll() is None, f"the run was to be killed, not to end: {ranks[0].said()}"
            time.sleep(0.005)
    finally:
        for one in ranks:
            one.kill()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines without their wall time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("seconds")} for line in lines]


@pytest.fixture(scope="module")
def train_settings(tiny_student: Path) -> TrainSettings:
    """6 steps of 6 rows a stage, as one process cuts them, a checkpoint every 2 steps; rows are selected, a weight falls, and terms'
    gradients are measured in the first step."""
    return TrainSettings(
        student=str(tiny_student),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=6,
        max_steps=STEPS,
        save_steps=2,
        report_to="none",
        log_term_gradients=STEPS,
        schedule={"vis": "linear:2:1"},
        select={"reg": "unless-contradicted:0.013", "vis": "confidence"},
    )


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(warm: Warm, tiny_cache: Path, train_settings: TrainSettings) -> Run:
    """``run(folder, processes, kill_at=None, by_torchrun=False, **train settings)`` → ``folder`` with the stages DPT and DFT trained by so
    many processes. DPT sees chat rows: some micro-batches are text-only where only the projector trains.

    kill_at: (stage, metrics lines): all processes are killed once there are so many.
    """

    def make(folder: Path, processes: int, kill_at: tuple[str, int] | None = None, **changes: Any) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "kd.toml").write_text('[train]\nlog_term_gradients = 6\n[stages.DPT]\nparts = ["sft"]\n')
        shared = {"output_dir": str(folder), "gradient_accumulation_steps": max(1, 6 // processes)}
        by_torchrun = changes.pop("by_torchrun", False)
        line = command(tiny_cache, replace(train_settings, **shared, **changes), "DPT,DFT")
        if by_torchrun:
            torchrun(processes, line, folder)
        elif kill_at:
            killed_at(folder / kill_at[0] / "metrics.jsonl", kill_at[1], warm.ranks(processes, kdcli, line, folder))
        else:
            warm.together(processes, line, folder)
        return folder

    return make


@pytest.fixture(scope="module")
def alone(tiny_cache: Path, train_settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    stages = {"DPT": StageSettings(parts=("sft",))}
    own = replace(train_settings, output_dir=str(folder))
    train(str(tiny_cache), "llava-kd", Settings(train=own, stages=stages), "DPT,DFT")
    return folder


@pytest.fixture(scope="module")
def sharded(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes with FSDP2, by torchrun."""
    return run(tmp_path_factory.mktemp("sharded"), 2, by_torchrun=True, fsdp=True)


RATES = {"01-DPT": 1e-3, "02-DFT": 2e-5}


def weights_of(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(stage / "model" / "model.safetensors")


def same_steps(ours: Path, theirs: Path, rate: float, rel: float = 1e-4) -> None:
    """The metrics agree up to rounding, and so do the weights."""
    for mine, other in zip(metrics(ours), metrics(theirs), strict=True):
        assert mine == pytest.approx(other, rel=rel, abs=1e-6)  # cosines of nearly orthogonal gradients
    mine, other = weights_of(ours), weights_of(theirs)
    assert mine.keys() == other.keys()
    off = torch.cat([(mine[name] - other[name]).flatten().abs() for name in other])
    # Adam turns rounding into steps of the learning rate where a gradient is nearly zero: rare, and never more than one a step
    assert off.max() <= 2 * STEPS * rate and (off > 1e-2 * rate).float().mean() < 1e-3


def test_two_processes_make_the_steps_of_one(run: Run, alone: Path, sharded: Path, tmp_path: Path) -> None:
    copies = run(tmp_path / "copies", 2)
    first = metrics(alone / "02-DFT")[0]
    assert 0 < first["kept/reg"] < 1 and first["weight/vis"] == 2 and "gradient_cosine/reg:vis" in first
    for stage, rate in RATES.items():
        same_steps(copies / stage, alone / stage, rate)
        same_steps(sharded / stage, alone / stage, rate)


@pytest.mark.parametrize("processes", of_all([1, 3], 1))
def test_killed_shards_go_on_bit_by_bit_and_with_other_numbers_of_processes(
    run: Run,
    tiny_cache: Path,
    train_settings: TrainSettings,
    sharded: Path,
    alone: Path,
    tmp_path: Path,
    processes: int,
) -> None:
    """FSDP2 on two processes, killed; two continue it with the same bits, another number with the same steps. One stands for three."""
    killed = run(tmp_path / "killed", 2, kill_at=("02-DFT", 4), fsdp=True)
    other = Path(shutil.copytree(killed, tmp_path / "other"))
    run(killed, 2, fsdp=True)
    for stage in RATES:
        assert metrics(killed / stage) == metrics(sharded / stage)
        ours, theirs = weights_of(killed / stage), weights_of(sharded / stage)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    if processes == 1:
        said: list[str] = []
        own = replace(train_settings, output_dir=str(other))
        stages = {"DPT": StageSettings(parts=("sft",))}
        train(str(tiny_cache), "llava-kd", Settings(train=own, stages=stages), "DPT,DFT", say=said.append)
        assert any("begun with 2 processes and continues with 1: 6 samples a step as before" in line for line in said)
    else:
        run(other, processes, fsdp=True)
    same_steps(other / "02-DFT", alone / "02-DFT", RATES["02-DFT"])
