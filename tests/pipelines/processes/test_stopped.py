"""SIGTERM and SIGUSR1, sent to real processes: they end in order with one line and 128 + signal, and the same command continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.capture import heartbeat
from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.inspect.cache import check, status
from pipelines.settings import Settings
from pipelines.train.train_student import train
from student_train.checkpoint import checkpoints
from student_train.config import TrainSettings
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.storage import Storage
from tests.warm import Child, Warm, kdcli

KDCLI = str(Path(sys.executable).with_name("kdcli"))
Process = subprocess.Popen[bytes] | Child
SHARDS = 31


@contextmanager
def started(line: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process group of its own, whose stderr goes to ``folder/stderr``; nothing of it is left behind."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            line, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )
        with none_left(process):
            yield process


@contextmanager
def forked(warm: Warm, line: list[str], folder: Path) -> Iterator[Child]:
    """The same of a process that imports nothing."""
    process = warm.start(kdcli, line[1:], folder=folder, errors=folder / "stderr")
    with none_left(process):
        yield process


@contextmanager
def none_left(process: Process) -> Iterator[None]:
    """Its whole group is gone behind this block."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(seen: Callable[[], Any], process: Process, folder: Path) -> Any:
    """What ``seen`` says once it says something; the process must still run then."""
    while not (found := seen()):
        assert process.poll() is None, (folder / "stderr").read_text()[-3000:]
        time.sleep(0.005)
    return found


def last_line(folder: Path) -> str:
    """Of what was told on stderr; no traceback is in it."""
    text = (folder / "stderr").read_text()
    assert "Traceback" not in text and "Error" not in text, text[-3000:]
    return text.splitlines()[-1]


def ended(number: int, timeout: float = 30.0) -> bool:
    """Whether the process with this number ends in time, or has become a zombie that nobody fetches."""
    for _ in range(int(timeout / 0.05)):
        try:
            if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


# ---- capture


def capture_line(request: CaptureRequest, workers: int) -> list[str]:
    line = [KDCLI, "cache-teacher", "--teacher", request.teacher.id, "--dtype", "float32", "--device", "cpu"]
    for spec in request.data:
        line += ["--data", spec.path, "--part", spec.part, "--template", spec.template]
        line += ["--image-root", spec.image_root or "."]
    line += ["--out", request.out, "--shards", str(SHARDS), "--fields", "response_hidden,affinity", "--codec", "bf16"]
    return [*line, "--batch-tokens", "1024", "--workers", str(workers)]


def capturing(cache: Path) -> Callable[[], list[int]]:
    """The process numbers of the workers, once a shard is committed."""

    def seen() -> list[int]:
        if not list(cache.glob("samples/commits/*.json")):
            return []
        return [int(word.host.rpartition(":")[2]) for word in heartbeat.words(Storage(cache))]

    return seen


def continues(request: CaptureRequest, workers: list[int]) -> None:
    """Nothing half-made is left, nobody is said to work, and a second run makes the rest."""
    cache, numbers = Path(request.out), list(dict.fromkeys(workers))
    assert numbers and all(ended(number) for number in numbers)
    assert not list(cache.glob(".staging/*"))
    body = status(TeacherCache(request.out))
    assert body["columns"]["samples"]["done"] < SHARDS and body["work"] is None
    summary = capture(request)
    assert summary["columns"]["fields/affinity"]["done"] == SHARDS and not check(TeacherCache(request.out))


@pytest.fixture
def stopped_request(make_request: Callable[..., CaptureRequest], tmp_path: Path) -> CaptureRequest:
    return make_request(tmp_path / "cache", "bf16", shards=SHARDS, fields=("response_hidden", "affinity"))


@pytest.mark.parametrize(
    ("workers", "number", "to_all"),
    [
        (1, signal.SIGTERM, True),
        (1, signal.SIGUSR1, False),
        *(
            pytest.param(2, *one, marks=pytest.mark.exhaustive)
            for one in ((signal.SIGTERM, False), (signal.SIGUSR1, True))
        ),
    ],
)
def test_a_capture_ends_in_order(
    workers: int,
    number: int,
    to_all: bool,
    stopped_request: CaptureRequest,
    own_modules: Callable[[Path], Path],
    tmp_path: Path,
    warm: Warm,
) -> None:
    """Sent to the command alone, or to every process as Slurm does. With two workers it is the program itself, in a folder where the
    user has modules with names of ours."""
    cache, line = tmp_path / "cache", capture_line(stopped_request, workers)
    own_modules(tmp_path)
    with started(line, tmp_path) if workers > 1 else forked(warm, line, tmp_path) as process:
        numbers = until(capturing(cache), process, tmp_path)
        (os.killpg if to_all else os.kill)(process.pid, number)
        assert process.wait(60) == 128 + number
    said = f"stopped by {signal.Signals(number).name}: committed shards are kept, the unfinished shard is dropped"
    assert last_line(tmp_path).startswith(said)
    continues(stopped_request, numbers)


def test_workers_whose_command_was_killed(stopped_request: CaptureRequest, tmp_path: Path, warm: Warm) -> None:
    """They end, too; until the next run nobody is said to work."""
    cache = tmp_path / "cache"
    with forked(warm, capture_line(stopped_request, 2), tmp_path) as process:
        numbers = until(capturing(cache), process, tmp_path)
        process.kill()
        process.wait()
        assert all(ended(number) for number in numbers)
    work = status(TeacherCache(str(cache)))["work"]
    assert not work["running"] and {
        int(one["host"].rpartition(":")[2]) for one in work["lost"] + work["failed"]
    } >= set(numbers)


# ---- training


def train_line(cache: Path, settings: TrainSettings, *more: str) -> list[str]:
    line = [KDCLI, "train-student", "--method", "sft", "--stages", "SFT", "--cache", str(cache), "--report-to", "none"]
    line += [
        "--student",
        str(settings.student),
        "--output-dir",
        settings.output_dir,
        "--max-steps",
        str(settings.max_steps),
    ]
    line += ["--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "2"]
    return [*line, "--save-steps", "1000000", *more]


def steps_logged(folder: Path) -> int:
    log = folder / "01-SFT" / "metrics.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0


def settings_of(student: Path, folder: Path, steps: int) -> TrainSettings:
    own = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": steps, "save_steps": 10**6}
    return TrainSettings(student=str(student), output_dir=str(folder), report_to="none", **own)


@pytest.mark.usefixtures("one_thread")
def test_training_ends_behind_a_checkpoint(tiny_cache: Path, tiny_student: Path, tmp_path: Path, warm: Warm) -> None:
    """Every process gets the signal, those that load rows too; the run goes on from the step that was made last."""
    settings = settings_of(tiny_student, tmp_path / "run", 60)
    line = train_line(tiny_cache, settings, "--dataloader-num-workers", "1")
    with forked(warm, line, tmp_path) as process:
        until(lambda: steps_logged(tmp_path / "run") >= 3, process, tmp_path)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    (kept,) = checkpoints(tmp_path / "run" / "01-SFT" / "checkpoints")
    made = int(kept.name.removeprefix("step-"))
    assert made == steps_logged(tmp_path / "run") < 60
    assert f"01-SFT: step {made} of 60 is in a checkpoint; run the same command again to continue" in last_line(
        tmp_path
    )
    train(str(tiny_cache), "sft", Settings(train=settings), "SFT")
    other = replace(settings, output_dir=str(tmp_path / "other"))
    train(str(tiny_cache), "sft", Settings(train=other), "SFT")
    ours, theirs = (load_file(tmp_path / run / "01-SFT" / "model" / "model.safetensors") for run in ("run", "other"))
    assert steps_logged(tmp_path / "run") == 60 and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def ranks(process: subprocess.Popen[bytes]) -> list[int]:
    """The process numbers of what torchrun started."""
    told = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False)
    return sorted(map(int, told.stdout.split()))


def test_two_processes_stop_at_one_step(tiny_cache: Path, tiny_student: Path, tmp_path: Path, warm: Warm) -> None:
    """One of them gets SIGUSR1; then both get SIGTERM."""
    line = train_line(tiny_cache, settings_of(tiny_student, tmp_path / "run", 100_000))[1:]
    made = 0
    for number, told in ((signal.SIGUSR1, slice(1, 2)), (signal.SIGTERM, slice(2))):
        both = warm.ranks(2, kdcli, line, tmp_path)
        try:
            while steps_logged(tmp_path / "run") < made + 3:
                assert both[0].poll() is None, both[0].said()
                time.sleep(0.005)
            for one in both[told]:
                os.kill(one.pid, number)
            first, second = (one.wait(100) for one in both)  # who is told by the other ends as by SIGTERM
            assert second == 128 + number and first == 128 + signal.SIGTERM
        finally:
            for one in both:
                one.kill()
        made = stopped_behind_a_checkpoint(tmp_path / "run", made, both[0].said())


def stopped_behind_a_checkpoint(run: Path, before: int, said: str) -> int:
    """The newest one is of the last step, which is told once. Returns that step."""
    made = steps_logged(run)
    newest = checkpoints(run / "01-SFT" / "checkpoints")[-1]
    assert int(newest.name.removeprefix("step-")) == made > before
    assert said.count(f"01-SFT: step {made} of 100000 is in a checkpoint") == 1, said[-3000:]
    return made


@pytest.mark.exhaustive
def test_torchrun_hands_a_signal_on(tiny_cache: Path, tiny_student: Path, tmp_path: Path) -> None:
    """One of its processes gets SIGUSR1; then torchrun gets SIGTERM."""
    launch = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    line = [*launch, *train_line(tiny_cache, settings_of(tiny_student, tmp_path / "run", 100_000))]
    made = 0
    for send in (lambda process: os.kill(ranks(process)[-1], signal.SIGUSR1), lambda process: process.terminate()):
        with started(line, tmp_path) as process:
            until(lambda before=made: steps_logged(tmp_path / "run") >= before + 3, process, tmp_path)
            numbers = ranks(process)
            send(process)
            assert process.wait(100) != 0 and len(numbers) == 2 and all(ended(number) for number in numbers)
        said = (tmp_path / "stderr").read_text()
        assert "SIGKILL" not in said, "none of them had to be killed"
        made = stopped_behind_a_checkpoint(tmp_path / "run", made, said)


@pytest.mark.exhaustive  # test_workers_whose_command_was_killed is the same for a capture
def test_a_run_ends_with_its_killed_torchrun(tiny_cache: Path, tiny_student: Path, tmp_path: Path) -> None:
    """It writes the checkpoint that a signal would have had it write, and its loader processes end, too."""
    launch = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--no-python"]
    settings = settings_of(tiny_student, tmp_path / "run", 100_000)
    line = [*launch, *train_line(tiny_cache, settings, "--dataloader-num-workers", "1")]
    with started(line, tmp_path) as process:
        until(lambda: steps_logged(tmp_path / "run") >= 3, process, tmp_path)
        (rank,) = ranks(process)
        told = subprocess.run(["ps", "-o", "pid=", "--ppid", str(rank)], capture_output=True, text=True, check=False)
        loaders = list(map(int, told.stdout.split()))
        process.kill()
        process.wait()
        assert loaders and all(ended(number) for number in (rank, *loaders))
    newest = checkpoints(tmp_path / "run" / "01-SFT" / "checkpoints")[-1]
    assert int(newest.name.removeprefix("step-")) == steps_logged(tmp_path / "run")
