"""Small real jobs that may be killed: capture and training with the demo's models, in children of a process that has imported everything.

Starting Python and importing torch takes as long as such a job; a fork takes milliseconds. Torch must not have run on several threads.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers.models.auto.modeling_auto
import transformers.models.llava.modeling_llava
import transformers.models.qwen2.modeling_qwen2
import transformers.models.siglip.modeling_siglip  # noqa: F401 (what a child would import)

from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.demo.run import DemoRecipe, make_world
from pipelines.settings import CaptureSettings, Settings
from pipelines.train.train_student import train
from student_train.config import TrainSettings
from teacher_cache.parent import end_with_parent
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.transformers import TeacherSpec

SCRATCH = (".staging", "progress")
"""Of a cache: what jobs under way leave, and no part of it."""


PARAMS = {"response_hidden": {"codec": "bf16"}}
"""Over the profile ``standard``: a whole head beside low-rank ones, and few rows calibrate it."""


@dataclass(frozen=True)
class Job:
    """What is run, killed and run again. ``out``: its folder. ``run`` ends with exit status 0 where the job is done."""

    out: Path
    run: Callable[[], None]


class Events:
    """One JSON line an event in ``work/events.jsonl``: a long count is stopped and continued."""

    def __init__(self, work: Path):
        work.mkdir(parents=True, exist_ok=True)
        self.file = work / "events.jsonl"

    def add(self, section: str, **event: Any) -> None:
        with self.file.open("a") as opened:
            opened.write(json.dumps({"section": section, **event}) + "\n")

    def of(self, section: str) -> list[dict[str, Any]]:
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        return [event for line in lines if line.endswith("}") and (event := json.loads(line))["section"] == section]


def mixture(work: Path, captions: int = 6, rows: int = 12) -> tuple[DataSpec, ...]:
    """Both parts of a demo world below ``work``, written once."""
    made = make_world(work / "world", replace(DemoRecipe(defects=2), captions=captions, train=rows, heldout=7))[1]
    return tuple(replace(part, image_root=part.image_root or str(work / "world")) for part in made)


def capture_request(teacher: str, data: tuple[DataSpec, ...], out: Path, workers: int = 1) -> CaptureRequest:
    """In one process, where no workers are asked for."""
    settings = CaptureSettings(shards=4, workers=workers, calibration_rows=8, batch_tokens=2048)
    return CaptureRequest(TeacherSpec(teacher, dtype="float32", device="cpu"), data, str(out), settings, PARAMS)


def write_config(file: Path) -> Path:
    """``PARAMS`` as a kd.toml."""
    file.write_text("".join(f"[fields.{name}]\ncodec = {one['codec']!r}\n" for name, one in PARAMS.items()))
    return file


def capture_flags(request: CaptureRequest) -> list[str]:
    """The same capture as a command line, with ``write_config``."""
    settings = request.settings
    flags = ["--teacher", request.teacher.id, "--dtype", "float32", "--device", "cpu", "--out", request.out]
    flags += ["--shards", str(settings.shards), "--workers", str(settings.workers)]
    flags += ["--calibration-rows", str(settings.calibration_rows)]
    flags += ["--batch-tokens", str(settings.batch_tokens)]
    for part in request.data:
        flags += ["--data", part.path, "--part", part.part, "--template", part.template]
        flags += ["--image-root", str(part.image_root)]
    return flags


def capture_job(request: CaptureRequest) -> Job:
    return Job(Path(request.out), lambda: void(capture(request)))


def training_settings(out: Path, student: str, steps: int = 10) -> Settings:
    """A few steps of llava-kd, a checkpoint every two."""
    return Settings(
        train=TrainSettings(
            student=student,
            output_dir=str(out),
            per_device_train_batch_size=2,
            max_steps=steps,
            save_steps=2,
            report_to="none",
        )
    )


def training_job(cache: Path, out: Path, student: str) -> Job:
    settings = training_settings(out, student)
    return Job(out, lambda: void(train(str(cache), "llava-kd", settings, "DFT")))


def run_main(command: list[str]) -> None:
    """A command line of kdcli; processes that it starts import what kdcli's own do."""
    import cli

    sys.modules["__main__"] = cli
    cli.main(command)


def training_command(student: str, cache: Path, stages: str = "DFT") -> Callable[[Path, Path], list[str]]:
    """(folder, kd.toml) → the command of ``training_settings``."""
    settings = training_settings(Path(), student).train

    def command(out: Path, config: Path) -> list[str]:
        line = ["train-student", "--method", "llava-kd", "--student", str(settings.student), "--cache", str(cache)]
        line += ["--stages", stages, "--output-dir", str(out), "--max-steps", str(settings.max_steps)]
        line += ["--save-steps", "2", "--per-device-train-batch-size", "2", "--report-to", "none"]
        return [*line, "--config", str(config)]

    return command


def one_line(log: Path) -> tuple[str, bool]:
    """(the last line that a user sees, whether it is the only error and there is no traceback)."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    errors = [line for line in lines if line.startswith("Error: ")]
    return last, errors == [last] and not any("Traceback" in line for line in lines)


def void(result: Any) -> None:
    """A job's result is what it leaves on disk."""


def forked(run: Callable[[], None], output: Path | None = None) -> int:
    """Start ``run`` in a child; its pid. Its exit status is 1 after an error, whose traceback goes to ``output`` with all it prints."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent, child = os.getpid(), os.fork()
    if child:
        return child
    status = 1
    try:
        end_with_parent(number=parent)
        target = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, 1)
        os.dup2(target, 2)
        torch.set_num_threads(1)
        run()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """Exit status of a child, −9 where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole_run(job: Job, output: Path | None = None) -> tuple[int, float]:
    """(exit status, seconds) of an undisturbed run."""
    started = time.monotonic()
    return wait(forked(job.run, output)), time.monotonic() - started


def killed_after(job: Job, seconds: float, when: Callable[[], bool] | None = None) -> int:
    """Exit status of a run that is killed after so many seconds: from its start, or from when ``when`` comes true."""
    child = forked(job.run)
    while when is not None and not when():
        time.sleep(0.0005)
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return wait(child)
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 0.01))
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return wait(child)
    os.kill(child, signal.SIGKILL)
    return wait(child)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a cache, scratch left out."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in files(folder)}


def files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.relative_to(folder).parts[0] not in SCRATCH and file.is_file():
            yield file


def identities(paths: Iterator[Path] | list[Path]) -> dict[str, tuple[int, int]]:
    """Inode and time of change of each: a file that was written anew has another."""
    return {str(file): (file.stat().st_ino, file.stat().st_mtime_ns) for file in paths}


def fresh(folder: Path) -> Path:
    """An empty place for a job's output."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder
