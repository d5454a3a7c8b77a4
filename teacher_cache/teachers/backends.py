"""Which backend a teacher runs on: the word before the colon of its id, transformers where there is none. Here each is opened."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from teacher_cache.teachers import null, transformers
from teacher_cache.teachers.null import NullTeacher
from teacher_cache.teachers.transformers import TeacherSpec, TransformersTeacher

OpenTeacher = TransformersTeacher | NullTeacher


def _backend(spec: TeacherSpec) -> ModuleType:
    return null if spec.id.startswith(null.PREFIX) else transformers


def load_processor(spec: TeacherSpec) -> tuple[Any, Any]:
    """(processor, config) without any weights; KdcliError where they are not to be had."""
    return _backend(spec).load_processor(spec)


def teacher_fingerprint(spec: TeacherSpec, processor: Any, config: Any) -> dict[str, Any]:
    """What decides the teacher's numbers; computed without loading the weights."""
    return _backend(spec).teacher_fingerprint(spec, processor, config)


def open_teacher(spec: TeacherSpec, processor: Any, config: Any) -> OpenTeacher:
    """The teacher, ready to be asked: on its device, with its weights."""
    kind = NullTeacher if _backend(spec) is null else TransformersTeacher
    return kind(spec, processor, config)
