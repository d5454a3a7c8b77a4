"""GRID.toml: the base of every student, what varies, and what the students are asked at the end.

Base: ``cache``, ``[train]``, ``[stages.*]``, ``[methods.*]``, as in kd.toml. ``[grid]``: axes, whose product is taken.
``[[variants]]``: named rows of the table, multiplied with the axes. ``[[eval]]``: held-out files. Keys of axes and variants are dotted
here: ``method``, ``seed``, ``learning_rate``, ``set.gamma`` (a knob), ``stage.DFT.max_steps``, ``stage.DPT.set.beta``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pipelines.judge.evaluation.run import check_metrics, evaluate_folder, pruning_of
from pipelines.settings import Settings, build, read_toml, refuse_unknown, settings_of
from pipelines.train.trackers import check_trackers
from student_train.config import StageSettings, TrainSettings
from student_train.stages import STAGES
from teacher_cache.errors import KdcliError
from teacher_cache.preparing.templates import find_template
from teacher_cache.sources import DataSpec, open_source

BASE = ("cache", "train", "stages", "methods")
CHOICES = ("method", "stages", "preset", "cache")
TRAIN = tuple(one.name for one in fields(TrainSettings) if one.name != "output_dir")
STAGE = tuple(one.name for one in fields(StageSettings) if one.name != "knobs")


@dataclass(frozen=True)
class EvalFile:
    """``[[eval]]``: a held-out file, asked of every student.

    Attributes:
        name: how the tables call it. limit: only the first so many rows. template: None: that each
            student was trained with.
        options: further keywords of ``pipelines.judge.evaluation.run.evaluate_folder``.
    """

    name: str
    path: str
    image_root: str | None = None
    format: str | None = None
    limit: int | None = None
    template: str | None = None
    follow_links: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> DataSpec:
        return DataSpec(
            self.name,
            self.path,
            image_root=self.image_root,
            format=self.format,
            template=self.template or DataSpec.template,
            limit=self.limit,
            follow_links=self.follow_links,
        )


@dataclass(frozen=True)
class Variant:
    """values: dotted key → value. evaluations: option tables, each asked with every held-out file; None: the files as they are."""

    name: str
    values: Mapping[str, Any]
    evaluations: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class AblationGrid:
    """A grid file.

    Attributes:
        body: the base tables as they stand in the file.
        axes: dotted key → values; their product is taken. baseline: the row that the others are held against, seed by seed.
        keep_models: False: the models of a stage go when no unfinished cell starts from them.
    """

    path: Path
    body: Mapping[str, Any]
    base: Settings
    axes: Mapping[str, list[Any]]
    variants: tuple[Variant, ...]
    files: tuple[EvalFile, ...]
    baseline: str | None = None
    keep_models: bool = True


def load_grid(path: Path) -> AblationGrid:
    """Read and check a grid file; KdcliError naming the table and the known keys."""
    body = read_toml(path, "a grid names what varies under [grid] and [[variants]], what stays the same as in kd.toml")
    own = ("grid", "variants", "eval", "baseline", "keep_models")
    refuse_unknown(body, {*BASE, *own}, str(path), "key")
    base = {name: body[name] for name in BASE if name in body}
    for name, kind in (("baseline", str), ("keep_models", bool)):
        if not isinstance(body.get(name, kind()), kind):
            raise KdcliError(f"{path}: {name} must be {'text' if kind is str else 'true or false'}, got {body[name]!r}")
    axes = {
        key: _axis(value, f"{path} [grid]: {key}")
        for key, value in _dotted(body.get("grid", {}), f"{path} [grid]").items()
    }
    variants = tuple(_variant(one, number, path) for number, one in enumerate(_list(body, "variants", path), start=1))
    if not axes and not variants:
        raise KdcliError(f"{path}: an empty grid: name axes under [grid], or rows as [[variants]]")
    for variant in variants:
        if twice := sorted(set(variant.values) & set(axes)):
            raise KdcliError(
                f"{path}: variant {variant.name!r} sets {', '.join(twice)}, which [grid] also varies: set it in one place"
            )
    return AblationGrid(
        path=path,
        body=base,
        base=settings_of(base, path),
        axes=axes,
        variants=variants,
        files=_files(_list(body, "eval", path), path),
        baseline=body.get("baseline"),
        keep_models=body.get("keep_models", True),
    )


def _list(body: Mapping[str, Any], name: str, path: Path) -> list[Any]:
    found = body.get(name, [])
    if not isinstance(found, list):
        raise KdcliError(f"{path}: {name} must be an array of tables, [[{name}]] with double brackets")
    return found


def _axis(value: Any, place: str) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise KdcliError(f"{place} has no values: give some, or remove the axis")
    if any(values.count(one) > 1 for one in values):
        raise KdcliError(f"{place} names a value twice: {values}")
    return values


def _variant(table: Any, number: int, path: Path) -> Variant:
    place = f"{path} [[variants]] {number}"
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str) or not table["name"].strip():
        raise KdcliError(f"{place}: a variant is a table with a name")
    place = f"{path} variant {table['name']!r}"
    evaluations = table.get("eval")
    if evaluations is not None:
        if not isinstance(evaluations, list) or not all(isinstance(one, Mapping) for one in evaluations):
            raise KdcliError(f"{place}: eval must be a list of tables of options")
        for one in evaluations:
            check_options(one, f"{place} eval")
        evaluations = tuple(evaluations)
    rest = {name: value for name, value in table.items() if name not in ("name", "eval")}
    return Variant(table["name"], _dotted(rest, place), evaluations)


def _dotted(table: Any, place: str) -> dict[str, Any]:
    """``{"set": {"beta": 0}}`` → ``{"set.beta": 0}``; KdcliError for a key that says nothing of a student."""
    refuse_unknown(table, {*CHOICES, *TRAIN, "set", "stage"}, place, "key")
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if name == "set":
            flat |= _under("set", value, f"{place} set")
        elif name == "stage":
            refuse_unknown(value, set(STAGES), f"{place} stage", "stage")
            for stage, one in value.items():
                refuse_unknown(one, {*STAGE, "set"}, f"{place} stage.{stage}", "key")
                flat |= {f"stage.{stage}.{key}": each for key, each in one.items() if key != "set"}
                flat |= _under(f"stage.{stage}.set", one.get("set", {}), f"{place} stage.{stage}.set")
        else:
            flat[name] = value
    return flat


def _under(prefix: str, table: Any, place: str) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise KdcliError(f"{place} must be a table of the method's knobs, e.g. set = {{gamma = 0.0}}, got {table!r}")
    return {f"{prefix}.{name}": value for name, value in table.items()}


def evaluation_options() -> set[str]:
    """What an evaluation can be told besides its file: the keywords of ``evaluate_folder``."""
    fixed = {"model_id", "spec", "device", "advance", "kept_in", "trust_remote_code"}  # the last stands under [train]
    parameters = inspect.signature(evaluate_folder).parameters.values()
    return {one.name for one in parameters if one.kind is not one.VAR_KEYWORD} - fixed


def check_options(options: Mapping[str, Any], place: str) -> None:
    """KdcliError where no student could be asked in this way."""
    refuse_unknown(options, evaluation_options(), place, "option")
    try:
        check_metrics(options.get("metrics", ()))
        pruning_of(*(options.get(name) for name in ("compress", "keep", "compress_layer")))
    except KdcliError as error:
        raise KdcliError(f"{place}: {error}") from None


def _files(tables: list[Any], path: Path) -> tuple[EvalFile, ...]:
    """The held-out files, each opened once so that a missing one is known before any training."""
    own = {one.name for one in fields(EvalFile)} - {"options"}
    found = []
    for table in tables:
        refuse_unknown(table, own | evaluation_options(), f"{path} [[eval]]", "key")
        options = {name: value for name, value in table.items() if name not in own}
        check_options(options, f"{path} [[eval]]")
        one = build(EvalFile, {name: value for name, value in table.items() if name in own}, f"{path} [[eval]]")
        found.append(replace(one, options=options))
        if one.template is not None:
            find_template(one.template)
        open_source(one.spec)
        pruning_of(*(options.get(name) for name in ("compress", "keep", "compress_layer")))
    names = [one.name for one in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise KdcliError(f"{path} [[eval]]: the name {', '.join(sorted(twice))} is used twice")
    return tuple(found)


def resolved_train(grid: AblationGrid, values: Mapping[str, Any], place: str) -> Settings:
    """The settings of one student: base tables, then what its axes and its variant say. TensorBoard only where the base asks."""
    train = {"report_to": "none", **grid.body.get("train", {}), **{key: values[key] for key in TRAIN if key in values}}
    stages: dict[str, dict[str, Any]] = {name: dict(table) for name, table in grid.body.get("stages", {}).items()}
    for key, value in values.items():
        kind, _, rest = key.partition(".")
        if kind != "stage":
            continue
        stage, _, name = rest.partition(".")
        table = stages.setdefault(stage, {})
        if name.startswith("set."):
            table["knobs"] = {**table.get("knobs", {}), name.removeprefix("set."): value}
        else:
            table[name] = value
    trained = build(TrainSettings, train, place)
    check_trackers(trained.trackers())
    return Settings(
        cache=str(values.get("cache", grid.base.cache or "")),
        train=trained,
        stages={name: build(StageSettings, table, f"{place} stage.{name}") for name, table in stages.items()},
        methods=grid.base.methods,
    )
