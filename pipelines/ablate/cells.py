"""The students of a grid, each decided and checked before the first one trains.

A stage's key hashes what decides its weights: the stage's identity and the key of the stage before it. Cells that begin with the same
stages share the folders ``OUT/stages/STAGE-KEY``; a cell's folder links to them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache as remember
from pathlib import Path
from typing import Any

from pipelines.ablate.cards import read_card, read_failure
from pipelines.ablate.grid import AblationGrid, EvalFile, resolved_train
from pipelines.judge.evaluation.run import pruning_of
from pipelines.settings import Settings
from pipelines.train.stage_identity import budget, stage_identity, start_hash
from pipelines.train.stage_plans import StagePlan, plan_stages
from pipelines.train.train_student import settle
from student_train.load_student import open_student
from student_train.methods import DEFAULT
from teacher_cache.errors import KdcliError
from teacher_cache.planning.plan import content_hash
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.sources import open_source

KEY = 8
"""Hexadecimal digits of a key in a folder's name."""
REQUEST, LOG = "request.json", "log.txt"


@dataclass(frozen=True)
class Evaluation:
    """One held-out file asked with one set of options. key: of the file's content and the options."""

    label: str
    file: EvalFile
    options: Mapping[str, Any]
    key: str


@dataclass(frozen=True)
class StageFolder:
    """name: ``01-PT``, as ``train-student`` calls it in the run; shared: ``PT-1a2b3c4d``, below ``OUT/stages``."""

    name: str
    shared: str


@dataclass(frozen=True)
class Cell:
    """One student: a row of the table with one seed.

    Attributes:
        row: the table's row. folder: of the run. stages: in order, with the folders that hold them.
        settings: ``train.output_dir`` is ``folder``.
    """

    row: str
    seed: int
    folder: Path
    method: str
    preset: str
    stage_names: str
    knobs: Mapping[str, Any]
    settings: Settings
    stages: tuple[StageFolder, ...]
    evaluations: tuple[Evaluation, ...]

    @property
    def name(self) -> str:
        return f"{self.row}/seed-{self.seed}"

    def stage_folders(self) -> list[Path]:
        return [shared_folder(self.folder, stage.shared) for stage in self.stages]

    def card(self) -> dict[str, Any]:
        """``cell.json`` of the finished parts of this cell; empty where there is none, or a damaged one, of which nothing is known."""
        return read_card(self.folder)[0]

    def damage(self) -> str:
        """One line on a ``cell.json`` that cannot be used; "" for none."""
        return read_card(self.folder)[1]

    def failure(self) -> dict[str, Any]:
        """``failed.json`` of a cell that failed; empty where there is none, or a damaged one: then it is tried again."""
        return read_failure(self.folder)

    def missing(self) -> list[Evaluation]:
        """Evaluations that ``cell.json`` does not hold."""
        results = self.card().get("results", {})
        return [one for one in self.evaluations if results.get(one.label, {}).get("key") != one.key]

    def state(self) -> str:
        """``done``, ``failed``, ``started`` (some stage of its own or shared is there) or ``new``."""
        if self.card() and not self.missing():
            return "done"
        if self.failure():
            return "failed"
        return "started" if any((one / "metrics.jsonl").is_file() for one in self.stage_folders()) else "new"


def shared_folder(cell: Path, shared: str) -> Path:
    """``OUT/stages/…`` of a cell folder ``OUT/ROW/seed-N-KEY``."""
    return cell.parents[1] / "stages" / shared


def make_cells(grid: AblationGrid, out: Path) -> list[Cell]:
    """Every student of the grid, rows in the order of the file. Refuses whatever cannot be trained, before anything is."""
    planner = _Planner(grid, out)
    cells = [planner.cell(row, values, evaluations) for row, values, evaluations in combinations(grid)]
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise KdcliError(f"{grid.path}: {', '.join(twice)} is used twice: give every variant its own name")
    rows = list(dict.fromkeys(cell.row for cell in cells))
    slugs = [slug(row) for row in rows]
    if clash := [row for row, one in zip(rows, slugs) if slugs.count(one) > 1 or one in ("", "stages")]:
        raise KdcliError(f"{grid.path}: {' and '.join(clash)} would get the same folder name: rename one")
    if grid.baseline and grid.baseline not in rows:
        raise KdcliError(f"{grid.path}: baseline {grid.baseline!r} is not a row; the rows are {', '.join(rows)}")
    return cells


def slug(name: str) -> str:
    """A row's name as a folder's."""
    return re.sub(r"[^\w.+=-]+", "-", name).strip("-.")


def combinations(grid: AblationGrid) -> Iterator[tuple[str, dict[str, Any], tuple[Mapping[str, Any], ...] | None]]:
    """(row name, dotted key → value, evaluation options) of every cell; seeds vary fastest."""
    axes = {key: values for key, values in grid.axes.items() if key != "seed"}
    axes |= {"seed": grid.axes["seed"]} if "seed" in grid.axes else {}
    for variant in grid.variants or (None,):
        for chosen in itertools.product(*axes.values()):
            picked = dict(zip(axes, chosen))
            told = [
                str(value) if key == "method" else f"{key.removeprefix('set.')}={value}"
                for key, value in picked.items()
                if key != "seed" and len(axes[key]) > 1
            ]
            values = {**picked, **(variant.values if variant else {})}
            named = [variant.name] if variant else ([] if told else [str(values.get("method", "student"))])
            yield ", ".join(named + told), values, variant.evaluations if variant else None


class _Planner:
    """Plans cells; what several of them ask of a cache or a file is looked up once."""

    def __init__(self, grid: AblationGrid, out: Path):
        self.grid, self.out = grid, out
        self.open = remember(TeacherCache)
        self.start = remember(start_hash)
        self.config = remember(lambda student: open_student(student, grid.base.train.trust_remote_code)[1])
        self.rows = remember(lambda url, parts, fields: sum(CachedSamples(self.open(url), parts, fields).counts))
        self.contents = {file.name: _content(file) for file in grid.files}

    def cell(self, row: str, values: Mapping[str, Any], options: tuple[Mapping[str, Any], ...] | None) -> Cell:
        place = f"{self.grid.path}: {row}"
        settings = resolved_train(self.grid, values, place)
        method, preset = values.get("method"), values.get("preset", DEFAULT)
        knobs = {key.removeprefix("set."): value for key, value in values.items() if key.startswith("set.")}
        for needed, value, where in (
            ("method", method, "under [grid] or in the variant"),
            ("cache", settings.cache, "at the top of the file or in the variant"),
            ("student", settings.train.student, "under [train]"),
        ):
            if not value:
                raise KdcliError(f"{place}: no {needed}: name it {where}")
        try:
            plans = self.plan(str(method), settings, values.get("stages"), preset, knobs)
            stages = self.stage_folders(plans, settings)
        except KdcliError as error:
            raise type(error)(f"{place}: {error}") from None
        folder = self.out / slug(row) / f"seed-{settings.train.seed}-{stages[-1].shared.rpartition('-')[2]}"
        return Cell(
            row=row,
            seed=settings.train.seed,
            folder=folder,
            method=str(method),
            preset=preset,
            stage_names=",".join(plan.stage.name for plan in plans),
            knobs=knobs,
            settings=settings,
            stages=stages,
            evaluations=tuple(self.evaluations(options, str(settings.train.student), place)),
        )

    def plan(
        self, method: str, settings: Settings, stages: Any, preset: Any, knobs: Mapping[str, Any]
    ) -> list[StagePlan]:
        for name, value in (("stages", stages), ("preset", preset)):
            if value is not None and not isinstance(value, str):
                raise KdcliError(f"{name} must be text, got {value!r}")
        cache = self.open(settings.cache)
        assert settings.train.student is not None
        plans, _ = settle(cache, plan_stages(cache, method, settings, stages, preset, knobs), settings.train.student)
        return plans

    def stage_folders(self, plans: list[StagePlan], settings: Settings) -> tuple[StageFolder, ...]:
        """Chained keys; a start that is no folder counts by its name, so the keys of earlier stages stand in for weights."""
        cache = self.open(settings.cache)
        start = f"start {self.start(settings.train.student)}"
        found = []
        for plan in plans:
            rows = self.rows(settings.cache, plan.parts, tuple(plan.served.names))
            total, global_batch = budget(plan, rows, 1)
            key = content_hash([plan.stage.name, stage_identity(cache, plan, total, global_batch, start)])
            found.append(StageFolder(plan.folder(Path()).name, f"{plan.stage.name}-{key[:KEY]}"))
            start = f"stage {key}"
        return tuple(found)

    def evaluations(
        self, options: tuple[Mapping[str, Any], ...] | None, student: str, place: str
    ) -> Iterator[Evaluation]:
        """Every held-out file with every table of options; refuses what this student cannot be asked."""
        for file in self.grid.files:
            for table in options or ({},):
                chosen = {**file.options, **table}
                pruning = pruning_of(*(chosen.get(name) for name in ("compress", "keep", "compress_layer")))
                if pruning:
                    try:
                        pruning.check(self.config(student))
                    except KdcliError as error:
                        raise type(error)(f"{place}: {error}") from None
                label = ", ".join([file.name, *(f"{name}={value}" for name, value in table.items())])
                asked = [file.template] if file.template else []
                digest = content_hash([self.contents[file.name], file.limit, chosen, *asked])
                yield Evaluation(label, file, chosen, digest)


def _content(file: EvalFile) -> Any:
    """What a held-out file holds, not where it lies."""
    fingerprint = open_source(file.spec).fingerprint()
    return [{key: value for key, value in one.items() if key not in ("path", "name")} for one in fingerprint["files"]]


def request(cell: Cell) -> dict[str, Any]:
    """What the cell's own process is told, as JSON."""
    settings = asdict(cell.settings)
    return {
        "row": cell.row,
        "seed": cell.seed,
        "cache": cell.settings.cache,
        "method": cell.method,
        "preset": cell.preset,
        "stages": cell.stage_names,
        "knobs": dict(cell.knobs),
        "settings": {name: settings[name] for name in ("train", "stages", "methods")},
        "stage_folders": [asdict(stage) for stage in cell.stages],
        "evaluations": [{**asdict(one), "file": asdict(one.file)} for one in cell.evaluations],
    }
