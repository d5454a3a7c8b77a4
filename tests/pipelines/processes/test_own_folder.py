"""No command that we show or start imports a user's cli.py, pipelines/ or socket.py. That those of a capture, of a grid's students, of
torchrun's processes and of a doctor's do not is tested where they are started (fixture ``own_modules``)."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


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
