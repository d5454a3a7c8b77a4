"""A real job takes the calibration that its preflight was judged with, instead of fitting another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teacher_cache.errors import CacheError, CompatibilityError
from teacher_cache.fields import CalibratedField
from teacher_cache.fields.calibration import Calibration
from teacher_cache.planning.plan import difference
from teacher_cache.reading.cache import TeacherCache, read_tensors

LEAST_ROWS = 128
"""Token rows of its kind that a calibration must have seen: tables of fewer say little of a mixture."""
FIX = "run `kdcli preflight` with these settings, or give --calibration '' to fit a new one"


def calibrations(
    cache: TeacherCache, fields: Mapping[str, CalibratedField], fingerprint: Mapping[str, Any]
) -> dict[str, Calibration]:
    """Each field's calibration out of another cache.

    Raises:
        CompatibilityError: it is of another teacher or other parameters (names what differs), or of too few rows.
        CacheError: it is missing or damaged.
    """
    return {name: calibration_of(cache, name, one, fingerprint) for name, one in fields.items()}


def calibration_of(cache: TeacherCache, name: str, one: CalibratedField, fingerprint: Mapping[str, Any]) -> Calibration:
    place = str(cache.storage)
    if name not in cache.fields:
        have = ", ".join(sorted(cache.fields)) or "none"
        raise CacheError(f"calibration {place}: it holds no field {name}, only {have}: {FIX}")
    body = cache.fields[name]
    there = {"version": body["version"], "params": body["params"], "teacher": body["teacher"]}
    here = {"version": one.version, "params": dict(one.params), "teacher": dict(fingerprint)}
    if there != here:
        lines = "; ".join(difference(there, here)).replace("cache ", "there ")
        raise CompatibilityError(f"calibration {place}: field {name} was fitted with other settings: {lines}: {FIX}")
    tensors = read_tensors(cache.storage, body.get("calibration"), name)
    rows = int(body["calibration"]["rows"])
    if rows < LEAST_ROWS:
        raise CompatibilityError(
            f"calibration {place}: field {name} was fitted on {rows} token rows, at least {LEAST_ROWS} are needed: "
            "run `kdcli preflight` with more --rows and another --out"
        )
    low_rank = read_tensors(cache.storage, body["low_rank_head"], name) if body.get("low_rank_head") else {}
    return Calibration(tensors, rows, low_rank)
