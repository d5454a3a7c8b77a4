"""The comparison as ``kdcli fidelity`` runs it, on the tiny teacher and student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def compared(tiny_teacher: Path, tiny_student: Path) -> Callable[..., dict[str, Any]]:
    """``compared(cache, samples=6, teacher=…, student=…, …)`` → the result of ``fidelity``, made once for the same arguments."""
    from pipelines.judge.fidelity import FidelityRequest, fidelity
    from teacher_cache.teachers.transformers import TeacherSpec

    made: dict[Any, dict[str, Any]] = {}

    def run(
        cache: Path, teacher: Path = tiny_teacher, student: Path | None = tiny_student, fresh: bool = False, **more: Any
    ) -> dict[str, Any]:
        key = (cache, teacher, student, tuple(sorted(more.items())))
        if fresh or key not in made:
            spec = TeacherSpec(str(teacher), device="cpu")
            asked = {"samples": 6, **more}
            result = fidelity(FidelityRequest(str(cache), spec, str(student) if student else None, **asked))
            if fresh:
                return result
            made[key] = result
        return made[key]

    return run
