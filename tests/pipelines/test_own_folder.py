"""The program in a folder where the user has a cli.py, a pipelines/ and a socket.py of their own: nothing of theirs is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KDCLI = Path(sys.executable).with_name("kdcli")


def test_a_capture_by_two_workers(
    own_modules: Callable[[Path], Path], tiny_teacher: Path, world: Any, tmp_path: Path
) -> None:
    folder = own_modules(tmp_path / "work")
    line = [str(KDCLI), "cache-teacher", "--teacher", str(tiny_teacher), "--data", str(world.captions)]
    line += [
        "--image-root",
        str(world.images),
        "--template",
        "plain",
        "--out",
        "cache",
        "--shards",
        "2",
        "--workers",
        "2",
    ]
    line += ["--fields", "response_topk", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "10 rows in 2 shards at cache" in done.stdout, done.stderr[-3000:]


TAKES_THEIRS = re.compile(
    r"torchrun(?!.*--no-python kdcli).*train-student"
    r"|python3? -m (?:cli|pipelines|teacher_cache|student_train|lmms_eval)\b"
    r"|sys\.executable,(?! \"-P\")"
)
"""``-m`` without ``-P`` begins with the folder in which it is typed; ``benchmarks`` lies in the checkout alone, where it belongs."""


def test_no_command_that_takes_the_users_modules() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "pipelines").rglob("*.py")]
    found = {
        str(page): TAKES_THEIRS.findall(page.read_text()) for page in [*pages, *(ROOT / "pipelines").rglob("*.md")]
    }
    assert len(found) > 100 and not {page: lines for page, lines in found.items() if lines}
