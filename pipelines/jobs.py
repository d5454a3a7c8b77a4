"""The two whole jobs, called from Python: as `kdcli cache-teacher` and `kdcli train-student` do them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipelines.capture import cache_teacher
from pipelines.settings import CaptureSettings, Settings, build
from pipelines.train import train_student
from student_train.config import StageSettings, TrainSettings
from student_train.methods import DEFAULT
from teacher_cache.errors import KdcliError
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.transformers import TeacherSpec

Say = Callable[[str], None]


def capture(
    teacher: str | TeacherSpec,
    data: str | DataSpec | Sequence[DataSpec],
    out: str,
    *,
    image_root: str | None = None,
    template: str = "chat",
    limit: int | None = None,
    field_params: Mapping[str, Mapping[str, Any]] | None = None,
    warn: Say = print,
    **settings: Any,
) -> dict[str, Any]:
    """Run the teacher over every row once and write the cache; again to continue. The rest is ``[capture]`` of docs/kd_toml.md.

    Args:
        teacher: folder, hub id, or ``TeacherSpec`` (with dtype, device, backend).
        data: a file, glob or brace URL, with ``image_root``, ``template`` and ``limit``; or ``DataSpec`` a part.
        settings: ``shards``, ``store``, ``fields``, ``workers``, …  field_params: parameters by field.
        warn: gets lines that a user should see.

    Returns:
        rows, skips by reason, bytes by column.

    Raises:
        KdcliError: nothing is written where a flag, the teacher or the data cannot be used.
    """
    if isinstance(data, str):
        part = "caption" if template == "plain" else "sft"
        data = DataSpec(part, data, image_root=image_root, template=template, limit=limit)
    elif image_root or limit is not None or template != "chat":
        raise KdcliError("capture: image_root, template and limit stand in each DataSpec where data are such")
    specs = (data,) if isinstance(data, DataSpec) else tuple(data)
    spec = TeacherSpec(teacher) if isinstance(teacher, str) else teacher
    asked = build(CaptureSettings, settings, "capture")
    return cache_teacher.capture(cache_teacher.CaptureRequest(spec, specs, out, asked, field_params or {}), warn=warn)


def train(
    cache: str,
    method: str,
    student: str,
    output_dir: str,
    *,
    stages: str | None = None,
    preset: str = DEFAULT,
    knobs: Mapping[str, Any] | None = None,
    stage_settings: Mapping[str, Mapping[str, Any]] | None = None,
    say: Say = print,
    **settings: Any,
) -> dict[str, Any]:
    """Train one student through its stages; again to continue. The rest is ``[train]`` of docs/kd_toml.md.

    Args:
        cache: address of the cache. student: model folder or hub id. stages: as ``DPT,SFT,DFT``; None: the method's own.
        stage_settings: by stage, what differs there (``{"DFT": {"max_steps": 10}}``).

    Returns:
        ``{"output": folder, "model": last Hugging Face folder, "stages": [...]}``
    """
    asked = build(TrainSettings, {"report_to": "none", **settings}, "train")
    asked = replace(asked, student=student, output_dir=output_dir)
    each = {name: build(StageSettings, told, f"stage {name}") for name, told in (stage_settings or {}).items()}
    return train_student.train(cache, method, Settings(train=asked, stages=each), stages, preset, knobs, say=say)
