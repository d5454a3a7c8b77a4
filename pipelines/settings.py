"""kd.toml and flags → frozen dataclasses. Defaults < file < flags; unknown keys are errors that list the known ones."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from student_train.config import StageSettings, TrainSettings
from teacher_cache.errors import KdcliError
from teacher_cache.fields import field_kinds
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.transformers import TeacherSpec
from teacher_cache.whole_file import write_whole

FILE = "kd.toml"
MOST = 1 << 62
"""No setting is a whole number so large; none is infinite or NaN."""
EXECUTORS = ("local", "ray", "slurm")
T = TypeVar("T")


@dataclass(frozen=True)
class CaptureSettings:
    """``[capture]``: how the cache is made. (The text below ``Attributes`` becomes ``docs/kd_toml.md``.)

    Attributes:
        shards: number of shards, fixed for the life of the cache.
        store: storage profile: ``standard``, ``compact``, ``exact``, or ``none`` (samples only).
        fields: fields to store instead of the profile.
        parts_without_fields: parts stored without fields, samples only.
        max_length: maximum length of a row in tokens, including those of its images.
        over_length: ``skip`` longer rows, or ``cut`` them at a turn.
        seed: seed of the order in which rows are distributed over shards.
        executor: scheduler of the shards: ``local``, ``ray`` or ``slurm``.
        workers: worker processes or Ray actors; 0: one per GPU, or one without GPUs.
        encode_workers: encoding threads per worker, beside its teacher; 0: from the number of cores, at most four.
        ray_address: address of a running Ray cluster; default: ``RAY_ADDRESS``, else this machine alone.
        gpus_per_worker: GPUs of a Ray actor; default: one if there are GPUs.
        cpus_per_worker: CPU cores of a Ray actor.
        slurm_tasks: number of tasks in the Slurm array.
        slurm_options: options for sbatch.
        batch_tokens: padded tokens per teacher batch.
        calibration_rows: rows that the teacher reads before the job, to fit the fields that need it.
        allow_skips: maximum share of a part's rows that may be skipped; above it, a capture stops before it begins or fails at its end.
        calibration: cache of a `kdcli preflight` to take calibrations from; default: fit new ones.
        staging_gb: maximum temporary disk per worker in GB (1e9 bytes), for unfinished tars of a cache in an object store; 0: no limit.
    """

    shards: int = 512
    store: str = "standard"
    fields: tuple[str, ...] = ()
    parts_without_fields: tuple[str, ...] = ()
    max_length: int = 2048
    over_length: str = "skip"
    seed: int = 0
    executor: str = "local"
    workers: int = 0
    encode_workers: int = 0
    ray_address: str | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: float = 1.0
    slurm_tasks: int = 8
    slurm_options: tuple[str, ...] = ()
    batch_tokens: int = 8192
    calibration_rows: int = 256
    calibration: str | None = None
    staging_gb: float = 0.0
    allow_skips: float = 0.05

    def __post_init__(self) -> None:
        for name in ("shards", "max_length", "batch_tokens", "calibration_rows"):
            if getattr(self, name) < 1:
                raise KdcliError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.encode_workers < 0:
            raise KdcliError(f"--encode-workers must not be negative, got {self.encode_workers}")
        if not self.staging_gb >= 0:
            raise KdcliError(f"--staging-gb must not be negative, got {self.staging_gb}")
        if not 0 <= self.allow_skips <= 1:
            raise KdcliError(f"--allow-skips is a share of the rows, from 0 to 1, got {self.allow_skips}")
        if self.executor not in EXECUTORS:
            raise KdcliError(f"--executor must be one of {', '.join(EXECUTORS)}, got {self.executor!r}")


@dataclass(frozen=True)
class Settings:
    """Everything a kd.toml can say.

    Attributes:
        teacher: ``[teacher]``.
        data: a ``[[data]]`` block a part.
        cache: the cache to write and read: a folder, or a URL such as ``s3://bucket/prefix``.
        capture: ``[capture]``.
        fields: ``[fields.NAME]``.
        train: ``[train]``.
        stages: ``[stages.NAME]``.
        methods: ``[methods.NAME]``.
    """

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
    return settings_of(read_toml(path, "`kdcli init` writes a commented kd.toml"), path)


def read_toml(path: Path, advice: str) -> dict[str, Any]:
    """The tables of a file; KdcliError with ``advice`` where there is none."""
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise KdcliError(f"{path}: no such file; {advice}") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # besides bad syntax and bytes: numbers of 5,000 digits, endless nesting
        raise KdcliError(f"{path}: not valid TOML ({error})") from None


def settings_of(body: Mapping[str, Any], path: Path) -> Settings:
    """The settings that the tables of ``path`` say; unknown sections and keys are refused."""
    known = {one.name for one in fields(Settings)}
    refuse_unknown(body, known, str(path), "section")
    from student_train.stages import STAGES

    data = body.get("data", [])
    if not isinstance(data, list):
        raise KdcliError(f"{path}: data must be an array of tables, [[data]] with double brackets")
    if not isinstance(body.get("cache", ""), str):
        raise KdcliError(f"{path}: cache must be text, got {body['cache']!r}")
    stages = _tables(body, "stages", set(STAGES), path)
    return Settings(
        teacher=build(TeacherSpec, body["teacher"], f"{path} [teacher]") if "teacher" in body else None,
        data=tuple(build(DataSpec, one, f"{path} [[data]]") for one in data),
        cache=body.get("cache"),
        capture=build(CaptureSettings, body.get("capture", {}), f"{path} [capture]"),
        fields=_tables(body, "fields", set(field_kinds()), path),
        train=build(TrainSettings, body.get("train", {}), f"{path} [train]"),
        stages={name: build(StageSettings, one, f"{path} [stages.{name}]") for name, one in stages.items()},
        methods=_method_tables(body, path),
    )


def _method_tables(body: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    if "methods" not in body:
        return {}  # most commands train nothing: no method, and no library of one, is imported for them
    from student_train.methods import method_modules

    return _tables(body, "methods", set(method_modules()), path)


def _tables(body: Mapping[str, Any], section: str, names: set[str], path: Path) -> dict[str, dict[str, Any]]:
    """``[section.NAME]`` tables; KdcliError listing the names that there are."""
    tables = body.get(section, {})
    refuse_unknown(tables, names, f"{path} [{section}]", section.removesuffix("s"))
    for name, table in tables.items():
        refuse_no_table(table, f"{path} [{section}.{name}]")
    return tables


def build(cls: type[T], table: Mapping[str, Any], place: str) -> T:
    """A dataclass from a TOML table; KdcliError naming ``place`` and the known keys, or the missing one."""
    known = {one.name: one for one in fields(cls)}  # type: ignore[arg-type]
    refuse_unknown(table, set(known), place, "key")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
    types = get_type_hints(cls)
    for name, value in values.items():
        if not _fits(value, types[name]):
            wanted = getattr(types[name], "__name__", str(types[name]))
            raise KdcliError(f"{place}: {name} must be {_KINDS.get(wanted, wanted)}, got {value!r}")
    required = [one.name for one in known.values() if one.default is MISSING and one.default_factory is MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise KdcliError(f"{place}: {', '.join(missing)} is missing")
    try:
        return cls(**values)
    except KdcliError as error:
        raise KdcliError(f"{place}: {error}") from None


_KINDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "tuple": "a list of texts",
}


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a TOML value is of a field's type: str, int, float, bool, a tuple of one of these, table, or one of these or None."""
    if isinstance(wanted, UnionType):
        return any(_fits(value, one) for one in get_args(wanted))
    if get_origin(wanted) is Mapping:
        return isinstance(value, Mapping)
    if get_origin(wanted) is tuple:
        return isinstance(value, tuple) and all(_fits(one, get_args(wanted)[0]) for one in value)
    if isinstance(value, bool):
        return wanted is bool
    if (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) >= MOST):
        return False
    return isinstance(value, (int, float) if wanted is float else wanted)


def refuse_unknown(table: Mapping[str, Any], known: set[str], place: str, what: str) -> None:
    """KdcliError listing the known keys of a table where it has another, or is none."""
    refuse_no_table(table, place)
    unknown = sorted(set(table) - known)
    if unknown:
        raise KdcliError(f"{place}: unknown {what} {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def refuse_no_table(table: Any, place: str) -> None:
    if not isinstance(table, Mapping):
        raise KdcliError(f"{place} must be a table, got {table!r}")


def override(settings: T, **flags: Any) -> T:
    """Replace every field whose flag was given (is not None)."""
    return replace(settings, **{name: value for name, value in flags.items() if value is not None})  # type: ignore[type-var]


def write_template(folder: Path) -> Path:
    """Write the commented kd.toml; KdcliError where one is already there."""
    target = folder / FILE
    if target.exists():
        raise KdcliError(f"{target} already exists: edit it, or move it away first")
    write_whole(target, (files("pipelines.command_line") / "kd_template.toml").read_bytes())
    return target


def as_json(settings: Any) -> dict[str, Any]:
    return asdict(settings)
