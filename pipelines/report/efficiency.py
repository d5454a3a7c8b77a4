"""What training from the cache costs, stage by stage: speed, waiting, memory, bytes read, tokens seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.report.charts import short
from pipelines.report.runs import RunRecord, StageRecord, stage_cards
from pipelines.terminal.tables import human_bytes
from pipelines.train.run_records import open_plain, parse_record
from teacher_cache.shards.schema import COUNT, MOST, misfit

NOTHING = "–"
MOST_HEADER = 100_000_000
"""Bytes of a safetensors header; the library itself takes no larger one."""


@dataclass(frozen=True)
class Cost:
    """One stage of one run, as text; ``NOTHING`` where it was not logged."""

    run: str
    stage: str
    method: str
    samples_per_second: str
    tokens_per_second: str
    step_seconds: str
    waiting: str
    padding: str
    peak_memory: str
    bytes_per_sample: str
    student_tokens: str
    teacher_tokens: str
    parameters: str


@dataclass(frozen=True)
class Efficiency:
    """A line a stage, and which columns anybody has something in: an empty one is not shown."""

    costs: list[Cost]
    shown: frozenset[str]


def efficiency(runs: Sequence[RunRecord], status: Mapping[str, Any] | None) -> Efficiency | None:
    """None where no stage has logged a step. status: ``inspect_cache.status`` of the cache."""
    sizes = _bytes_per_sample(status) if status else {}
    costs = [
        _cost(run, stage, sizes if status and run.card.get("plan_hash") == status["plan_hash"] else {})
        for run in runs
        for stage in run.stages
        if stage.points
    ]
    if not costs:
        return None
    columns = [name for name in vars(costs[0]) if any(getattr(one, name) != NOTHING for one in costs)]
    return Efficiency(costs, frozenset(columns))


def _cost(run: RunRecord, stage: StageRecord, sizes: Mapping[str, float]) -> Cost:
    points = stage.points
    step, waited = _total(points, "seconds"), _total(points, "data_seconds")
    tokens, places = _total(points, "tokens"), _total(points, "places")
    spent = step + (waited or 0.0) if step is not None else None
    peak = max((one["peak_memory_bytes"] for one in points if "peak_memory_bytes" in one), default=None)
    seconds = [one["seconds"] for one in points if "seconds" in one]
    return Cost(
        run=run.name,
        stage=stage.name,
        method=stage.method,
        samples_per_second=_rate(_samples(stage), spent),
        tokens_per_second=_rate(tokens, spent),
        step_seconds=f"{statistics.median(seconds):.3g}" if seconds else NOTHING,
        waiting=_share(waited, spent),
        padding=_share(places - tokens, places) if places is not None and tokens is not None else NOTHING,
        peak_memory=human_bytes(peak) if peak is not None else NOTHING,
        bytes_per_sample=_read(run, stage, sizes),
        student_tokens=_rate(_total(points, "vision_tokens"), _total(points, "images")),
        teacher_tokens=_rate(_total(points, "cached_vision_tokens"), _total(points, "images")),
        parameters=_count(parameters(stage.folder / "model") if stage.done else None),
    )


def _total(points: Sequence[Mapping[str, float]], key: str) -> float | None:
    """Over the logged steps; None where one of them does not say it (an older program wrote it)."""
    return sum(one[key] for one in points) if all(key in one for one in points) else None


def _samples(stage: StageRecord) -> float | None:
    """Of the logged steps; where they do not say it, as the whole stage had a step."""
    logged = _total(stage.points, "samples")
    if logged is None and stage.samples and stage.steps:
        return stage.samples / stage.steps * len(stage.points)
    return logged


def _rate(amount: float | None, by: float | None) -> str:
    return short(float(f"{amount / by:.3g}")) if amount is not None and by else NOTHING


def _share(part: float | None, whole: float | None) -> str:
    return f"{100 * part / whole:.1f} %" if whole and part is not None else NOTHING


def _count(number: int | None) -> str:
    return NOTHING if number is None else f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


def _bytes_per_sample(status: Mapping[str, Any]) -> dict[str, float]:
    """Tar bytes a row of every column, over the whole cache."""
    written = {name.removeprefix("fields/"): one for name, one in status["columns"].items() if one["written"]}
    return {name: one["bytes"] / one["written"] for name, one in written.items()}


def _read(run: RunRecord, stage: StageRecord, sizes: Mapping[str, float]) -> str:
    """What a sample of this stage takes from storage: ``samples`` and the fields that serve its method."""
    card = stage_cards(run.card).get(stage.folder.name)
    if card is None or not sizes:
        return NOTHING
    fields = {name for names in card.get("fields", {}).values() for name in names}
    return human_bytes(sum(sizes.get(name, 0.0) for name in ("samples", *fields)))


def parameters(model: Path) -> int | None:
    """Of a saved model, from the headers of its safetensors files: tied weights are stored, and counted, once. None: not saved yet."""
    files = sorted(model.glob("*.safetensors"))
    return sum(map(_elements, files)) if files else None


def _elements(file: Path) -> int:
    fix = "remove its folder to train that stage again"
    with open_plain(file, fix) as opened:
        size = int.from_bytes(opened.read(8), "little")
        data = opened.read(min(size, MOST_HEADER))
    header = parse_record(data, str(file), _misfit_of_header, fix)
    return _count_of(header)


def _count_of(header: Mapping[str, Any]) -> int:
    return sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")


def _misfit_of_header(header: Any) -> str:
    """Of a safetensors file."""
    tensors = {name: one for name, one in header.items() if name != "__metadata__"}
    wrong = misfit(tensors, {...: {"shape": [COUNT]}})
    return wrong or ("" if _count_of(tensors) < MOST else "its tensors are larger than any memory")
