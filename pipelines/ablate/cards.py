"""How a cell ended, read back from ``cell.json`` or ``failed.json``: of a damaged one nothing is known, and it is made again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipelines.train.run_records import Check, fits, misfit_of_result, read_record
from teacher_cache.errors import KdcliError
from teacher_cache.shards.schema import misfit

CARD, FAILED = "cell.json", "failed.json"


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """(``cell.json``, "") of a cell's folder; ({}, "") where there is none, ({}, what is wrong with it) where it is damaged."""
    return _known(folder / CARD, _misfit_of_card)


def read_failure(folder: Path) -> dict[str, Any]:
    """``failed.json`` of a cell's folder; empty where there is none, or a damaged one."""
    return _known(folder / FAILED, fits({"error": str, "log": str}))[0]


def _known(path: Path, check: Check) -> tuple[dict[str, Any], str]:
    try:
        return (read_record(path, check, "it is made again"), "") if os.path.lexists(path) else ({}, "")
    except KdcliError as error:
        return {}, str(error)


_CARD = {
    "results": {...: {"key": str, "scores": dict}},
    "losses?": {...: {...: (float, None)}},
    "seconds": {"train": float, "evaluate": float},
}


def _misfit_of_card(body: Any) -> str:
    results = body["results"].items() if not (wrong := misfit(body, _CARD)) else ()
    return wrong or next(
        filter(None, (misfit_of_result(one["scores"], f"results.{name}") for name, one in results)), ""
    )
