"""Training on several processes (torchrun, gloo): DDP and FSDP2 make the steps of one process, and another number continues a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.settings import Settings
from pipelines.train_student import train
from student_train.config import StageSettings, TrainSettings

STEPS = 6
FLAGS = ("student", "output_dir", "max_steps", "save_steps", "per_device_train_batch_size", "report_to")
FLAGS += ("gradient_accumulation_steps", "compressor")


def command(cache: Path, train: TrainSettings, stages: str, method: str = "llava-kd") -> list[str]:
    """A run as a command line."""
    line = ["train-student", "--method", method, "--cache", str(cache), "--stages", stages]
    for name in FLAGS:
        if getattr(train, name) is not None:
            line += [f"--{name.replace('_', '-')}", str(getattr(train, name))]
    return line + [f"--{name}" for name in ("fsdp", "bf16") if getattr(train, name)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(processes: int, line: list[str], folder: Path, kill_at: tuple[Path, int] | None = None) -> str:
    """What a run of so many processes printed on stderr. It is started where a user has modules with names of ours.

    Args:
        kill_at: (metrics.jsonl, lines): SIGKILL to all processes once it has so many lines.
    """
    for name in ("cli.py", "pipelines.py", "teacher_cache.py"):
        (folder / name).write_text(f"raise SystemExit('the user's own {name} was imported')\n")
    program = Path(sys.executable).with_name("kdcli")
    launch = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launch += ["--no-python", str(program)]
    with (folder / "stderr").open("w+") as errors:
        process = subprocess.Popen(
            [*launch, *line],
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            if kill_at:
                log, lines = kill_at
                while process.poll() is None and not (log.is_file() and log.read_text().count("\n") >= lines):
                    time.sleep(0.005)
                assert process.poll() is None, "the run was to be killed, not to end"
            else:
                assert process.wait(timeout=280) == 0, (folder / "stderr").read_text()[-3000:]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return (folder / "stderr").read_text()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines without their wall time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("seconds")} for line in lines]


@pytest.fixture(scope="module")
def train_settings(tiny_student: Path) -> TrainSettings:
    """6 steps of 6 rows a stage, as one process cuts them, a checkpoint every 2 steps."""
    return TrainSettings(
        student=str(tiny_student),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=6,
        max_steps=STEPS,
        save_steps=2,
        report_to="none",
    )


def run(
    cache: Path, settings: TrainSettings, folder: Path, processes: int, kill_at: tuple[str, int] | None = None
) -> Path:
    """``folder`` with the stages DPT and DFT trained by so many processes. DPT sees chat rows: some micro-batches are text-only where
    only the projector trains.

    Args:
        kill_at: (stage, metrics lines): all processes are killed once there are so many.
    """
    folder.mkdir(exist_ok=True)
    (folder / "kd.toml").write_text('[stages.DPT]\nparts = ["sft"]\n')
    own = replace(settings, output_dir=str(folder), gradient_accumulation_steps=max(1, 6 // processes))
    at = (folder / kill_at[0] / "metrics.jsonl", kill_at[1]) if kill_at else None
    torchrun(processes, command(cache, own, "DPT,DFT"), folder, at)
    return folder


@pytest.fixture(scope="module")
def alone(tiny_cache: Path, train_settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    stages = {"DPT": StageSettings(parts=("sft",))}
    own = replace(train_settings, output_dir=str(folder))
    train(str(tiny_cache), "llava-kd", Settings(train=own, stages=stages), "DPT,DFT")
    return folder


@pytest.fixture(scope="module")
def sharded(tiny_cache: Path, train_settings: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes with FSDP2."""
    return run(tiny_cache, replace(train_settings, fsdp=True), tmp_path_factory.mktemp("sharded"), 2)


RATES = {"01-DPT": 1e-3, "02-DFT": 2e-5}


def weights_of(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(stage / "model" / "model.safetensors")


def same_steps(ours: Path, theirs: Path, rate: float, rel: float = 1e-4) -> None:
    """The metrics agree up to rounding, and so do the weights."""
    for mine, other in zip(metrics(ours), metrics(theirs), strict=True):
        assert mine == pytest.approx(other, rel=rel)
    mine, other = weights_of(ours), weights_of(theirs)
    assert mine.keys() == other.keys()
    off = torch.cat([(mine[name] - other[name]).flatten().abs() for name in other])
    # Adam turns rounding into steps of the learning rate where a gradient is nearly zero: rare, and never more than one a step
    assert off.max() <= 2 * STEPS * rate and (off > 1e-2 * rate).float().mean() < 1e-3


def test_two_processes_make_the_steps_of_one(
    tiny_cache: Path, train_settings: TrainSettings, alone: Path, sharded: Path, tmp_path: Path
) -> None:
    copies = run(tiny_cache, train_settings, tmp_path / "copies", 2)
    for stage, rate in RATES.items():
        same_steps(copies / stage, alone / stage, rate)
        same_steps(sharded / stage, alone / stage, rate)


def test_killed_shards_go_on_bit_by_bit_and_with_other_numbers_of_processes(
    tiny_cache: Path, train_settings: TrainSettings, sharded: Path, alone: Path, tmp_path: Path
) -> None:
    """FSDP2 on two processes, killed; two continue it with the same bits, one and three with the same steps."""
    settings = replace(train_settings, fsdp=True)
    killed = run(tiny_cache, settings, tmp_path / "killed", 2, kill_at=("02-DFT", 4))
    for copy in ("one", "three"):
        shutil.copytree(killed, tmp_path / copy)
    run(tiny_cache, settings, killed, 2)
    for stage in RATES:
        assert metrics(killed / stage) == metrics(sharded / stage)
        ours, theirs = weights_of(killed / stage), weights_of(sharded / stage)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    said: list[str] = []
    own = replace(train_settings, output_dir=str(tmp_path / "one"))
    stages = {"DPT": StageSettings(parts=("sft",))}
    train(str(tiny_cache), "llava-kd", Settings(train=own, stages=stages), "DPT,DFT", say=said.append)
    assert any("begun with 2 processes and continues with 1: 6 samples a step as before" in line for line in said)
    run(tiny_cache, settings, tmp_path / "three", 3)
    for copy in ("one", "three"):
        same_steps(tmp_path / copy / "02-DFT", alone / "02-DFT", RATES["02-DFT"])
