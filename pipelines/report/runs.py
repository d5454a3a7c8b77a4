"""Run folders as the report reads them: the run card, every stage's metrics, and scores where a run has them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.train.run_records import DONE, TRAIN_AGAIN, fits, read_points, read_record, read_run_card, read_scores
from pipelines.train.stage_records import folder_of
from teacher_cache.errors import KdcliError

SEED = re.compile(r"^(?P<group>.*?)[-_./]*seed[-_=]?\d+(-[0-9a-f]{8})?$")
"""A run's name without its seed; cells of an ablation end in a hash besides."""


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run.

    Attributes:
        points: one dictionary a logged step, as in ``metrics.jsonl``. terms: its ``loss`` keys, the total first.
        told: its ``weight`` and ``kept`` keys: of terms that have a schedule, or select.
        done: the stage ended (``done.json`` is there). written: when its last file was. folder: of the stage.
    """

    name: str
    method: str
    points: list[dict[str, float]]
    terms: tuple[str, ...]
    steps: int
    samples: int | None
    done: bool
    written: datetime
    folder: Path
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunRecord:
    """One run folder. ``group``: its name without the seed, so that runs of several seeds are one line of the results."""

    name: str
    group: str
    folder: Path
    card: Mapping[str, Any]
    stages: list[StageRecord]
    scores: Mapping[str, Any]

    @property
    def written(self) -> datetime | None:
        return max((stage.written for stage in self.stages), default=None)

    @property
    def seconds(self) -> float:
        """Time inside optimizer steps; steps that were not logged count as the logged ones of their stage."""
        return sum(_scaled(stage, "seconds") for stage in self.stages)

    @property
    def tokens(self) -> float:
        return sum(_scaled(stage, "tokens") for stage in self.stages)


def _scaled(stage: StageRecord, key: str) -> float:
    values = [point[key] for point in stage.points if key in point]
    return sum(values) / len(values) * max(stage.steps, len(values)) if values else 0.0


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Every run at these folders; a folder of runs (an ablation) stands for the runs inside it.

    Raises:
        KdcliError: a path without any run, or a damaged file in one.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _find(Path(path))))
    return [_read_run(folder, name) for folder, name in zip(folders, _names(folders))]


def _find(path: Path) -> list[Path]:
    if os.path.lexists(path / "run.json"):
        return [path]
    found = sorted(card.parent for depth in ("*", "*/*") for card in path.glob(f"{depth}/run.json"))
    if not found:
        raise KdcliError(f"{path} holds no run (no run.json): name the --output-dir of a `kdcli train-student`")
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path; more of them where that is a bare seed, or not enough to tell two runs apart."""
    parts = [folder.resolve().parts for folder in folders]
    lengths = [2 if SEED.match(one[-1]) and not SEED.match(one[-1])["group"] else 1 for one in parts]  # type: ignore[index]
    for _ in range(max(map(len, parts), default=0)):
        names = ["/".join(one[-length:]) for one, length in zip(parts, lengths)]
        lengths = [length + (names.count(name) > 1) for name, length in zip(names, lengths)]
    return ["/".join(one[-length:]) for one, length in zip(parts, lengths)]


def _read_run(folder: Path, name: str) -> RunRecord:
    card = read_run_card(folder / "run.json")
    logs = sorted(folder.glob("*/metrics.jsonl"))
    cards = stage_cards(card)
    stages = [_read_stage(log.parent, cards.get(log.parent.name, {}).get("method", "")) for log in logs]
    seeded = SEED.match(name)
    group = (seeded["group"] if seeded else "") or name
    scores = read_scores(folder / "scores.json") if os.path.lexists(folder / "scores.json") else {}
    if "families" in scores:
        scores = {group: scores}
    return RunRecord(name, group, folder, card, stages, scores)


def stage_cards(card: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Name of a stage's folder → what the run card says of the stage, in order; the last is the newest command's last."""
    return {folder_of(number, one): one for number, one in enumerate(card.get("stages", []), start=1)}


def _read_stage(folder: Path, method: str) -> StageRecord:
    log, done = folder / "metrics.jsonl", folder / "done.json"
    points = read_points(log)
    ended = os.path.lexists(done)
    result = read_record(done, fits(DONE), TRAIN_AGAIN).get("result", {}) if ended else {}
    terms = dict.fromkeys(key for point in points for key in point if key == "loss" or key.startswith("loss/"))
    told = dict.fromkeys(key for point in points for key in point if key.startswith(("weight/", "kept/")))
    last = done if ended else log
    return StageRecord(
        name=folder.name.partition("-")[2] or folder.name,
        method=method,
        points=points,
        terms=tuple(terms),
        steps=int(result.get("steps", points[-1]["step"] + 1 if points else 0)),
        samples=result.get("samples"),
        done=ended,
        written=datetime.fromtimestamp(last.stat().st_mtime, UTC),
        folder=folder,
        told=tuple(told),
    )
