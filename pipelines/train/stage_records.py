"""What is written down of a run: of each stage beside its weights, and ``run.json``, which puts them together for whoever reads runs.

A stage's own record (in ``state.json`` of its checkpoints and ``done.json``) is written with the weights and says what they were trained
with: ``starts``, the card of each start from the step on that it began with, and ``before``, the same of the stages that it began from.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipelines.train.stage_plans import StagePlan
from student_train.checkpoint import newest_state
from student_train.whole import DONE_FILE, make_folder, read_done
from teacher_cache.errors import KdcliError, stripped
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.whole_file import write_whole

STAGE_FOLDER = re.compile(r"\d\d+-\w+")


def stage_card(cache: TeacherCache, plan: StagePlan) -> dict[str, Any]:
    """What a stage was told, resolved, with cache, versions and git commit; JSON types only."""
    import transformers

    body = {
        "folder": plan.folder(Path()).name,
        "stage": plan.stage.name,
        "method": plan.method_name,
        "knobs": asdict(plan.method),  # type: ignore[call-overload]
        "parts": plan.parts,
        "templates": {part: cache.template(part) for part in plan.parts},
        "fields": {need: list(fields) for need, fields in plan.served.fields.items()},
        "settings": asdict(plan.settings),
        "compressor": plan.compressor and plan.compressor.entry(),
        "cache": str(cache.storage),
        "plan_hash": cache.plan_hash,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "git": git_commit(),
    }
    return stripped(json.loads(json.dumps(body, default=str)))


def git_commit() -> str | None:
    """Commit of the program's own checkout, None where it is installed without one."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def recorded(stage: Path) -> dict[str, Any] | None:
    """The card that a stage's weights were last trained with; None where nothing is trained, or a version of before wrote no record."""
    body = read_done(stage) if (stage / DONE_FILE).is_file() else newest_state(stage / "checkpoints")
    return last_card(body) if body else None


def last_card(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of ``done.json`` or ``state.json``: the card of its last start; None where it is of a version without."""
    starts = body.get("starts")
    card = starts[-1].get("card") if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else None
    return card if isinstance(card, dict) and {"stage", "settings", "cache", "plan_hash"} <= card.keys() else None


def write_run_card(output: Path, cards: Sequence[Mapping[str, Any]], say: Callable[[str], None]) -> None:
    """``run.json``: the cards of this command's stages, behind those of the other stages that the folder holds.

    A stage that is trained, wholly or in part, stands there with its own record.

    Args:
        cards: of this command's stages, in order.
    """
    make_folder(output)
    there = _cards_there(output / "run.json", say)
    asked = [str(card["folder"]) for card in cards]
    told = {**there, **{str(card["folder"]): dict(card) for card in cards}}
    folders = sorted(one.name for one in output.iterdir() if STAGE_FOLDER.fullmatch(one.name) and has_weights(one))
    told |= {name: own for name in folders if (own := recorded_quietly(output / name))}
    kept = [name for name in folders if name in told and name not in asked]
    last = cards[-1]
    body = {
        **{name: last[name] for name in ("cache", "plan_hash")},
        "stages": [told[name] for name in [*kept, *asked]],
        **{name: last[name] for name in ("versions", "git")},
    }
    write_whole(output / "run.json", json.dumps(body, indent=1) + "\n")


def has_weights(stage: Path) -> bool:
    return (stage / DONE_FILE).is_file() or any((stage / "checkpoints").glob("step-*"))


def recorded_quietly(stage: Path) -> dict[str, Any] | None:
    """A damaged record of a stage that nobody asked for stops nobody."""
    try:
        card = recorded(stage)
    except KdcliError:
        return None
    return card and {**card, "folder": stage.name}


def _cards_there(path: Path, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Cards by folder of the ``run.json`` that stands there; none where it is damaged, as the stages have their own records."""
    if not path.is_file():
        return {}
    try:
        stages = json.loads(path.read_bytes())["stages"]
        return {
            folder_of(number, one): {**one, "folder": folder_of(number, one)} for number, one in enumerate(stages, 1)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        say(f"note: {path} is damaged and is written again, from the stages' own records")
        return {}


def folder_of(number: int, card: Mapping[str, Any]) -> str:
    """Of a stage's card in ``run.json``, counted from 1; versions of before numbered the stages of one command."""
    return str(card.get("folder") or f"{number:02d}-{card['stage']}")
