"""kd.toml and flags → frozen dataclasses. Defaults < file < flags; unknown keys are errors that list the known ones."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from student_train.config import StageSettings, TrainSettings
from teacher_cache.errors import KdcliError
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.transformers import TeacherSpec

FILE = "kd.toml"
T = TypeVar("T")


@dataclass(frozen=True)
class CaptureSettings:
    """``[capture]``: how the cache is made.

    Attributes:
        shards: number of slices, fixed for the life of the cache.
        fields: what is stored of the teacher. parts_without_fields: parts of which only the samples are stored.
        workers: processes; 0: one a GPU, else one.
        batch_tokens: padded tokens of one teacher batch.
    """

    shards: int = 512
    fields: tuple[str, ...] = ("response_topk", "vision_topk", "response_hidden", "vision_hidden")
    parts_without_fields: tuple[str, ...] = ()
    max_length: int = 2048
    over_length: str = "skip"
    seed: int = 0
    workers: int = 0
    batch_tokens: int = 8192


@dataclass(frozen=True)
class Settings:
    """Everything a kd.toml can say."""

    teacher: TeacherSpec | None = None
    data: tuple[DataSpec, ...] = ()
    cache: str | None = None
    capture: CaptureSettings = field(default_factory=CaptureSettings)
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    train: TrainSettings = field(default_factory=TrainSettings)
    stages: Mapping[str, StageSettings] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def load_settings(path: Path | None) -> Settings:
    """The settings of a file, of ``kd.toml`` in the current folder where ``path`` is None, or the defaults."""
    if path is None:
        if not Path(FILE).is_file():
            return Settings()
        path = Path(FILE)
    try:
        body = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise KdcliError(f"{path}: no such file; `kdcli init` writes a commented kd.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KdcliError(f"{path}: not valid TOML ({error})") from None
    known = {one.name for one in fields(Settings)}
    _refuse_unknown(body, known, str(path), "section")
    from student_train.stages import STAGES

    stages = body.get("stages", {})
    _refuse_unknown(stages, set(STAGES), f"{path} [stages]", "stage")
    return Settings(
        teacher=build(TeacherSpec, body["teacher"], f"{path} [teacher]") if "teacher" in body else None,
        data=tuple(build(DataSpec, one, f"{path} [[data]]") for one in body.get("data", [])),
        cache=body.get("cache"),
        capture=build(CaptureSettings, body.get("capture", {}), f"{path} [capture]"),
        fields=body.get("fields", {}),
        train=build(TrainSettings, body.get("train", {}), f"{path} [train]"),
        stages={name: build(StageSettings, one, f"{path} [stages.{name}]") for name, one in stages.items()},
        methods=body.get("methods", {}),
    )


def build(cls: type[T], table: Mapping[str, Any], place: str) -> T:
    """A dataclass from a TOML table; KdcliError naming ``place`` and the known keys, or the missing one."""
    known = {one.name: one for one in fields(cls)}  # type: ignore[arg-type]
    _refuse_unknown(table, set(known), place, "key")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
    try:
        made = cls(**values)
    except TypeError as error:
        raise KdcliError(f"{place}: {str(error).split('__init__() ')[-1]}") from None
    for name, value in values.items():
        default = getattr(cls, name, None)
        if default is not None and not isinstance(value, _accepts(default)):
            raise KdcliError(f"{place}: {name} must be a {type(default).__name__}, got {value!r}")
    return made


def _accepts(default: Any) -> tuple[type, ...]:
    return (int, float) if isinstance(default, float) else (type(default),)


def _refuse_unknown(table: Mapping[str, Any], known: set[str], place: str, what: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise KdcliError(f"{place}: unknown {what} {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def override(settings: T, **flags: Any) -> T:
    """Replace every field whose flag was given (is not None)."""
    return replace(settings, **{name: value for name, value in flags.items() if value is not None})  # type: ignore[type-var]


def write_template(folder: Path) -> Path:
    """Write the commented kd.toml; KdcliError where one is already there."""
    target = folder / FILE
    if target.exists():
        raise KdcliError(f"{target} already exists: edit it, or move it away first")
    target.write_text((files("pipelines") / "kd_template.toml").read_text())
    return target


def as_json(settings: Any) -> dict[str, Any]:
    return asdict(settings)
