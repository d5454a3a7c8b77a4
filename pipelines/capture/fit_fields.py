"""Before the workers: fields learn their calibrations, and the teacher is asked about canary samples."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pipelines.capture import canaries
from pipelines.capture.calibrate import calibrate
from pipelines.capture.worker import CaptureRequest, make_preparer, sample_readers
from teacher_cache.fields import CalibratedField
from teacher_cache.fields.calibration import Calibration
from teacher_cache.planning.plan import Plan, content_hash
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.storage import Storage
from teacher_cache.teachers.backends import (
    linear_head,
    load_processor,
    open_teacher,
)


def fit_fields(
    request: CaptureRequest,
    storage: Storage,
    plan: Plan,
    loaded: tuple[Any, Any],
    fields: Mapping[str, CalibratedField],
) -> dict[str, Calibration]:
    """Calibrations of new fields by the teacher itself, which leaves the device again before workers start."""
    settings = request.settings
    teacher = open_teacher(request.teacher, *loaded)
    sketched = any(name.endswith("_hidden") for name in fields)
    return calibrate(
        fields,
        plan,
        make_preparer(request, *loaded),
        teacher,
        linear_head(teacher) if sketched else teacher.head,
        settings.calibration_rows,
        settings.batch_tokens,
        frozenset(settings.parts_without_fields),
        sample_readers(request, storage, plan),
    )


def ask_canaries(
    request: CaptureRequest, preflight: TeacherCache, storage: Storage, fingerprint: dict[str, Any]
) -> list[str]:
    """Notes; CompatibilityError where this machine's teacher is not the preflight's. It leaves the device before workers start."""
    folder = f"teacher/{content_hash(fingerprint)[:12]}"
    processor, config = load_processor(request.teacher)
    load = partial(open_teacher, request.teacher, processor, config)
    note = canaries.check(preflight, folder, processor, config, load)
    canaries.copy(preflight.storage, storage, folder)
    return [note]
