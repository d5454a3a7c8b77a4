"""Cached multimodal teachers in Python: ten names (docs/library.md). ``python -m kdcli`` is the program of the same name.

Importing this imports neither torch nor transformers; each name is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcli import losses
    from pipelines.jobs import capture, train
    from student_train.library.cache import Cache, open_cache
    from student_train.library.collator import Collator
    from student_train.library.hf_trainer import DistillTrainer
    from student_train.library.signals import TeacherSignals
    from student_train.methods import Method
    from teacher_cache.fields import Field

__all__ = [
    "Cache",
    "Collator",
    "DistillTrainer",
    "Field",
    "Method",
    "TeacherSignals",
    "capture",
    "losses",
    "open_cache",
    "train",
]

_HOMES = {
    "Cache": "student_train.library.cache",
    "Collator": "student_train.library.collator",
    "DistillTrainer": "student_train.library.hf_trainer",
    "Field": "teacher_cache.fields",
    "Method": "student_train.methods",
    "TeacherSignals": "student_train.library.signals",
    "capture": "pipelines.jobs",
    "open_cache": "student_train.library.cache",
    "train": "pipelines.jobs",
}


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("kdcli.losses")
    if name not in _HOMES:
        raise AttributeError(f"module 'kdcli' has no attribute {name!r}; it has {', '.join(__all__)}")
    import_module("pipelines.processes.quiet_threads")  # before torch
    found = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
