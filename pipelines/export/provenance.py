"""Where an exported student comes from: the model that is meant, the run around it, the cache and the teacher behind that."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.report.runs import stage_cards
from pipelines.train.run_records import (
    DONE,
    TRAIN_AGAIN,
    fits,
    misfit_of_run,
    odd,
    read_record,
    read_run_card,
    read_scores,
)
from pipelines.train.stage_records import last_card
from student_train.whole import DONE_FILE, read_done
from teacher_cache.errors import KdcliError
from teacher_cache.preparing.templates import TEMPLATES
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.schema import misfit

TOLD = {
    "cache": str,
    "plan_hash": str,
    "stages": [
        {
            "method": str,
            "parts": [str],
            "settings": {"student": str, "learning_rate": float, "seed": int, "bf16": bool},
        }
    ],
}
"""What a model card says of ``run.json``."""


@dataclass(frozen=True)
class Provenance:
    """What the model card says.

    Attributes:
        model: the folder that is exported. card: cache, versions and commit that it was trained with, None where it stands alone.
        stages: that its weights went through, the exported one last, each with the ``result`` of its ``done.json``.
        cache: ``plan_hash``, ``rows`` by part, ``fields`` with the teacher's fingerprint; None where it could not be opened.
        scores: results by name.
    """

    model: Path
    card: Mapping[str, Any] | None
    stages: tuple[Mapping[str, Any], ...]
    cache: Mapping[str, Any] | None
    scores: Mapping[str, Any]


def find_model(source: Path) -> Path:
    """A model folder, a stage's, or that of a run's last stage; KdcliError naming what a run has where that one is not finished."""
    if (source / "config.json").is_file():
        return source
    if (source / "model" / "config.json").is_file():
        return source / "model"
    if not os.path.lexists(source / "run.json"):
        inside = sorted(str(one.parent) for one in source.glob("*/run.json"))
        advice = f"the runs in it are {', '.join(inside)}" if inside else "name one of them"
        raise KdcliError(f"{source} is neither a model folder (config.json) nor a run (run.json): {advice}")
    folders = [source / name for name in stage_cards(read_run_card(source / "run.json"))]
    if folders and (folders[-1] / "done.json").is_file() and (folders[-1] / "model" / "config.json").is_file():
        return folders[-1] / "model"
    ready = [str(one / "model") for one in folders if (one / "model" / "config.json").is_file()]
    advice = f"or take {', '.join(ready)}" if ready else "no stage has a model yet"
    raise KdcliError(f"{source}: its last stage is not finished: run the same `kdcli train-student` again, {advice}")


def read_provenance(model: Path, scores: Path | None) -> Provenance:
    """scores: file of ``kdcli eval --out``; None: the run's ``scores.json``, if there is one."""
    stage = model.absolute().parent
    run = stage.parent
    card, stages = read_stages(stage)
    if scores is None and card is not None and os.path.lexists(run / "scores.json"):
        scores = run / "scores.json"
    results = read_scores(scores) if scores else {}
    if "families" in results:
        results = {model.name: results}
    if any(isinstance(one, list) for one in results.values()):
        raise KdcliError(f"{scores}: it has several results with the same name: give a file of `kdcli eval --out`")
    if card is None:
        return Provenance(model, None, (), None, results)
    if wrong := misfit({**card, "stages": list(stages)}, TOLD):
        raise KdcliError(f"{stage}: the records of its training do not fit: {wrong}: {TRAIN_AGAIN}")
    return Provenance(model, card, stages, read_cache(card), results)


def read_stages(stage: Path) -> tuple[Mapping[str, Any] | None, tuple[Mapping[str, Any], ...]]:
    """(card, stages) of ``Provenance`` for the model of a stage's folder.

    The stage's own record was written with the weights, so it is asked first; ``run.json`` speaks for versions that wrote none.
    """
    done = _ended(stage)
    if done and (own := last_card(done)):
        before = [{**one["card"], "result": one["result"]} for one in done.get("before", ()) if one.get("card")]
        stages = [*before, {**own, "result": done["result"]}]
        body = {**own, "stages": stages}
        if wrong := misfit_of_run(body) or odd(body):
            raise KdcliError(f"{stage / DONE_FILE}: {wrong}: {TRAIN_AGAIN}")
        return own, tuple(stages)
    path = stage.parent / "run.json"
    card = read_run_card(path) if os.path.lexists(path) else {}
    cards = stage_cards(card)
    if stage.name not in cards:
        return None, ()
    used = []
    for name in list(cards)[: list(cards).index(stage.name) + 1]:
        ended = _ended(stage.parent / name)
        used.append({**cards[name], "result": ended["result"] if ended else {}})
    return card, tuple(used)


def _ended(stage: Path) -> dict[str, Any] | None:
    """A stage's ``done.json``, as far as cards tell of it; None where it is not finished."""
    done = read_done(stage) if (stage / DONE_FILE).is_file() else None
    shape = {**DONE, "before?": [{"card?": (dict, None), "result": dict}]}
    if wrong := misfit(done, shape) if done else "":
        raise KdcliError(f"{stage / DONE_FILE}: {wrong}: {TRAIN_AGAIN}")
    return done


def trained_template(model: str) -> str | None:
    """The template in which a stage's model was asked while it trained; None where nobody knows, or it only wrote captions.

    Raises:
        KdcliError: it was asked in several.
    """
    _, stages = read_stages(Path(model).absolute().parent)
    known = stages[-1] if stages else {}
    asking = sorted(set(known.get("templates", {}).values()) & TEMPLATES.keys() - {"plain"})
    if len(asking) > 1:
        raise KdcliError(f"{model} was trained with the templates {' and '.join(asking)}: choose one with --template")
    return asking[0] if asking else None


def read_cache(card: Mapping[str, Any]) -> dict[str, Any] | None:
    """None where the run's cache is not there any more, or is another one now."""
    with suppress(KdcliError, OSError, ImportError, ValueError):
        cache = TeacherCache(card["cache"], tolerant=True)
        if cache.plan_hash == card["plan_hash"]:
            rows = {part.spec.part: part.rows for part in cache.plan.parts}
            return {"plan_hash": cache.plan_hash, "rows": rows, "fields": cache.fields}
    return None


def read_object(path: Path) -> dict[str, Any]:
    return read_record(path, fits({}), "save the model again")
