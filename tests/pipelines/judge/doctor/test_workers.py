"""Processes that read the doctor's rows find what one process finds, and end with the process that started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from pipelines.judge.doctor.rows import Reading, RowExaminer
from teacher_cache.preparing.prepare import Limits
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.transformers import TeacherSpec

ROOT = Path(__file__).parents[4]
KILLED = """
import multiprocessing, os, signal, sys
from pipelines.judge.doctor.rows import Reading, RowExaminer
from pipelines.judge.doctor.workers import working
from teacher_cache.preparing.prepare import Limits
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.transformers import TeacherSpec

if __name__ == "__main__":
    examiner = RowExaminer([DataSpec("sft", sys.argv[1])], Reading(TeacherSpec(sys.argv[2]), Limits(90), show=3))
    groups = examiner.sources[0].scan(20)
    with working(examiner, 0, workers=2) as submit:
        every = [submit(0, group) for group in groups]
        for one in every:
            print(one.result())
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def rows_of(folder: Path, count: int) -> str:
    def talk(number: int) -> list[dict[str, str]]:
        answer = "<|end|>" if number % 50 == 7 else f"word {number} " * (number % 40 + 1)
        return [{"from": "human", "value": f"what {number}?"}, {"from": "gpt", "value": answer}]

    file = folder / "rows.json"
    file.write_text(json.dumps([{"id": str(number), "conversations": talk(number)} for number in range(count)]))
    return str(file)


@pytest.mark.exhaustive  # a program of its own; test_stopped.py has workers whose command was killed
def test_two_processes_find_what_one_does_and_end_with_their_parent(
    own_modules: Callable[[Path], Path], tiny_teacher: Path, tmp_path: Path
) -> None:
    """Also where the parent is killed, and can tell nobody; and in a folder where the user has modules with names of ours."""
    rows, here = rows_of(tmp_path, 100), own_modules(tmp_path / "here")
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    words = [sys.executable, str(script), rows, str(tiny_teacher)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL, done.stderr
    *tallies, children = done.stdout.splitlines()
    examiner = RowExaminer([DataSpec("sft", rows)], Reading(TeacherSpec(str(tiny_teacher)), Limits(90), show=3))
    alone = [examiner(0, group) for group in examiner.sources[0].scan(20)]
    assert tallies == [repr(tally) for tally in alone]
    assert {kind for tally in alone for kind, _ in tally.found} == {"reserved_token", "over_length"}
    processes = [int(word) for word in children.split()]
    assert len(processes) == 2
    until = time.monotonic() + 60
    while alive := [one for one in processes if is_alive(one)]:
        assert time.monotonic() < until, f"{alive} live on"
        time.sleep(0.1)


def is_alive(process: int) -> bool:
    with suppress(OSError):  # no such process
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state != "Z"
    return False
