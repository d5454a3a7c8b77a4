"""Every file that a command writes outside of a cache, on a disk that takes no more: one line that names it, and no half of anything."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.judge.fidelity import write_plot
from pipelines.judge.fidelity.show import write_record
from pipelines.judge.preflight import kd_toml
from pipelines.report.page import write_report
from pipelines.settings import write_template
from pipelines.train import trackers
from pipelines.train.trackers import TrackedStage, open_trackers
from student_train.distributed import Processes
from student_train.metrics_log import MetricsLog
from teacher_cache.errors import DiskError
from tests.pipelines.report.conftest import make_run, result  # noqa: F401

KDCLI = str(Path(sys.executable).with_name("kdcli"))
MEASURED: dict[str, Any] = {"distributions": {}, "sweep": [], "terms": {}, "notes": ["x" * 9000]}
WRITERS: dict[str, Callable[[Path], Any]] = {
    "fidelity.json": lambda folder: write_record(folder / "fidelity.json", MEASURED),
    "fidelity.png": lambda folder: write_plot(MEASURED, folder / "fidelity.png"),
    "scores.json": lambda folder: write_record(
        folder / "scores.json", {name: result(0.5) for name in ("teacher", "sft", "llava-kd")}
    ),
    "kd.toml": write_template,
    "metrics.jsonl": lambda folder: MetricsLog(folder, 10**6, 1, Processes(0, 1, torch.device("cpu")), lambda step: ()),
}


def seen(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


@pytest.mark.parametrize("name", WRITERS)
def test_one_line_and_what_was_there_stays(tmp_path: Path, small_files: Callable[[int], Any], name: str) -> None:
    if name == "metrics.jsonl":
        (tmp_path / name).write_text("".join(f'{{"step": {step}}}\n' for step in range(100)))
    elif name != "kd.toml":
        (tmp_path / name).write_text("before")
    before = seen(tmp_path)
    said = rf"{name}: cannot be written \(File too large\): .*make room"
    with pytest.raises(DiskError, match=said) as caught, small_files(64):
        WRITERS[name](tmp_path)
    assert "\n" not in str(caught.value) and seen(tmp_path) == before


def test_a_report(make_run: Callable[..., Path], tmp_path: Path, small_files: Callable[[int], Any]) -> None:  # noqa: F811
    run, out = make_run("kd"), tmp_path / "pages" / "report.html"
    with pytest.raises(DiskError, match=r"report\.html: cannot be written \(File too large\)"), small_files(4096):
        write_report([run], None, out)
    assert not seen(out.parent)


def test_what_a_preflight_chose_is_told_all_the_same(tmp_path: Path, small_files: Callable[[int], Any]) -> None:
    path = tmp_path / "kd.toml"
    path.write_text("# mine\n[capture]\nstore = 'compact'\n")
    before = seen(tmp_path)
    with small_files(16):
        body = kd_toml.write(path, {"capture": {"store": "standard"}})
    assert not body["written"] and "File too large" in body["why"] and 'store = "standard"' in body["block"]
    assert seen(tmp_path) == before


def test_a_tracker_that_finds_no_room_is_a_note(
    tmp_path: Path, small_files: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent:
        replaces = False

        def __init__(self, stage: TrackedStage, run: str): ...

        def log(self, step: int, values: Any) -> None: ...

        def finish(self) -> None: ...

    monkeypatch.setitem(trackers.BACKENDS, "wandb", Silent)
    said: list[str] = []
    with small_files(16):
        open_trackers(["wandb"], TrackedStage(tmp_path, 0, "identity", {}), said.append)
    assert len(said) == 1 and "trackers.json: cannot be written (File too large)" in said[0] and not seen(tmp_path)


def test_tensorboard_on_a_full_disk_is_a_note_and_no_traceback(
    tmp_path: Path, small_files: Callable[[int], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    (tracker,) = open_trackers(["tensorboard"], TrackedStage(tmp_path, 0, "identity", {}), said.append)
    with small_files(100):
        for step in range(1000):
            tracker.log(step, {"loss": 1.0})
            if said:
                break
            time.sleep(0.002)
        tracker.finish()
    assert len(said) == 1 and "File too large" in said[0] and "Traceback" not in capfd.readouterr().err


def kdcli(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command as a shell runs it."""
    text = line.replace("kdcli", KDCLI)
    return subprocess.run(["bash", "-c", text], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("ulimit -f 0; kdcli init", 1, "kd.toml: cannot be written (File too large)"),
        ("kdcli completion bash > /dev/full", 1, "standard output: No space left on device: complete files are kept"),
        ("kdcli --help > /dev/full", 1, "standard output: No space left on device"),
        ("kdcli completion bash | head -1; exit ${PIPESTATUS[0]}", None, ""),
        ("kdcli init >&- 2>&- <&-", 0, ""),
        ("kdcli nonsense 2> /dev/full", 1, ""),
    ],
)
def test_a_command_in_a_shell(tmp_path: Path, line: str, status: int | None, said: str) -> None:
    done = kdcli(line, tmp_path)
    assert status in (None, done.returncode) and done.returncode in (0, 1), done.stderr
    assert done.stderr.count("\n") == bool(said) and said in done.stderr, done.stderr
    assert list(seen(tmp_path)) == (["kd.toml"] if ">&-" in line else [])
    if ">&-" in line:
        assert (tmp_path / "kd.toml").read_text().startswith("#"), "what was printed did not get into it"


def test_notes_that_nobody_can_read_end_nothing(tmp_path: Path) -> None:
    program = (
        "from pipelines.command_line.output import console, note, warn; note('x'); warn('y'); "
        "from pipelines.terminal.progress import bar\n"
        "with bar(console(), 'rows') as progress: progress.update(progress.add_task('a', total=2), completed=2)\n"
        "print('went on')"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, text=True, check=False
        )
    assert done.stdout == "went on\n" and done.returncode in (0, 120), "120: Python's own word on stderr at its end"


def test_a_full_temporary_folder_is_named(tiny_cache: Path, small_files: Callable[..., Any]) -> None:
    """A report unpacks the cache's tokenizer into it."""
    from teacher_cache.reading.cache import TeacherCache
    from teacher_cache.reading.teacher_tokenizer import tokenizer_of

    cache = TeacherCache(str(tiny_cache))
    with small_files(600), pytest.raises(DiskError, match=r"tokenizer.*\.json: cannot be written"):
        tokenizer_of(cache)
