"""What a ``kdcli fidelity`` or a ``kdcli preflight`` measured, from the file that it left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.judge.fidelity.plot import family_of
from pipelines.judge.preflight.request import NOTEBOOK
from pipelines.train.run_records import fits, parse_record, read_plain
from teacher_cache.errors import KdcliError
from teacher_cache.shards.places import local_path, place_of
from teacher_cache.shards.storage import Storage

FIX = "give the file of `kdcli fidelity --out FILE.json`, or the folder of a `kdcli preflight`"
OWN = "this cache"


@dataclass(frozen=True)
class StoredFidelity:
    """One way to store the distributions of a row kind, as it was measured.

    Attributes:
        bytes: a row. kl: nats, mean. angles: direction (``forward``, ``reverse``) → degrees between the gradients of the student's
            head; loss_errors: direction → (stored − live) / |live|. Each is NaN or left out where it was not measured.
        chosen: a preflight took it.
    """

    kind: str
    label: str
    family: str
    bytes: float
    kl: float = math.nan
    angles: Mapping[str, float] = field(default_factory=dict)
    loss_errors: Mapping[str, float] = field(default_factory=dict)
    chosen: bool = False


@dataclass(frozen=True)
class LossTerm:
    """One term of the methods from the cache, against the live teacher; floor: the live teacher against itself, run otherwise."""

    name: str
    fields: str
    loss_error: float
    angle: float
    floor_error: float
    floor_angle: float


@dataclass(frozen=True)
class MeasuredFile:
    """One file. about: what was compared, one sentence."""

    name: str
    about: str
    stored: list[StoredFidelity]
    terms: list[LossTerm]


def read_fidelity(paths: Sequence[Path | str]) -> list[MeasuredFile]:
    """KdcliError naming a file that is none of the two."""
    return [_read(path) for path in paths]


def _read(path: Path | str) -> MeasuredFile:
    found = place_of(path)
    place = f"{found.text}/{NOTEBOOK}" if found.local and Path(found.path).is_dir() else found.text
    folder, _, name = place.rpartition("/")
    try:
        data = read_plain(local_path(place), FIX) if found.local else Storage(folder).read(name)
    except OSError:
        raise KdcliError(f"{place} cannot be read: {FIX}") from None
    body = parse_record(data, place, fits({}), FIX)
    try:
        return _of_fidelity(place, body) if "distributions" in body else _of_preflight(place, body)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise KdcliError(f"{place} holds no measurement ({type(error).__name__}: {error}): {FIX}") from None


def _of_fidelity(place: str, body: Mapping[str, Any]) -> MeasuredFile:
    rows = body["rows"]
    about = (
        f"{body['samples']} samples ({int(rows['response']):,} response and {int(rows['vision']):,} vision rows) of {body['cache']}, live "
        f"teacher {body['teacher']} ({body['dtype']}), gradients of student {body['student']}"
    )
    stored = [
        _stored(
            one["kind"],
            f"{OWN}: {' + '.join(_short(name) for name in one['fields'])}",
            OWN,
            one["payload_per_row"],
            one,
        )
        for one in body["distributions"].values()
    ]
    stored += [
        _stored(one["kind"], one["label"], family_of(one["fields"]), one["bytes_per_row"], one)
        for one in body["sweep"]
        if "error" not in one
    ]
    return MeasuredFile(place, about, stored, [_term(name, one) for name, one in body["terms"].items()])


def _stored(kind: str, label: str, family: str, size: float, one: Mapping[str, Any]) -> StoredFidelity:
    measured = {direction: one[direction] for direction in ("forward", "reverse") if one.get(direction)}
    return StoredFidelity(
        _text(kind),
        _text(label),
        family,
        float(size),
        _number((one.get("kl") or {}).get("mean")),
        {direction: _number(each.get("head_angle")) for direction, each in measured.items()},
        {direction: _number(each.get("loss_error")) for direction, each in measured.items()},
    )


def _term(name: str, one: Mapping[str, Any]) -> LossTerm:
    """The floor is the larger of the other live runs of one dtype: where there is none, NaN."""
    cache = one["cache"]
    floor = one.get("one by one", {})
    return LossTerm(
        name,
        " + ".join(_short(each) for each in one["fields"]),
        _number(cache["loss_error"]),
        _number(cache["gradient_angle"]),
        _number(floor.get("loss_error")),
        _number(floor.get("gradient_angle")),
    )


def _of_preflight(place: str, body: Mapping[str, Any]) -> MeasuredFile:
    """Its notebook, or what its ``--json`` printed; candidates that nobody had to measure, since a cheaper one did, are left out."""
    found = body.get("found", body)
    stored = []
    for choice in found.get("choices", []) if "found" in body else found["choices"]:  # a preflight may be going on
        for one in choice["ladder"]:
            angles = {direction: _number(angle) for direction, angle in one["head_angles"].items()}
            kl = _number(one["kl"])
            if not one["error"] and (angles or math.isfinite(kl)):
                own = one["label"] == choice["label"]
                whole = any(params.get("codec") not in (None, "sketch") for params in one["fields"].values())
                family = "hidden" if whole else family_of(one["fields"])
                kind, label, size = _text(one["kind"]), _text(one["label"]), float(one["bytes_per_row"])
                stored.append(StoredFidelity(kind, label, family, size, kl, angles, chosen=own))
    terms = [
        LossTerm(
            f"{method['method']}: {name}",
            " + ".join(map(_short, one["fields"])),
            *(_number(one[key]) for key in ("loss_error", "gradient_angle", "floor_error", "floor_angle")),
        )
        for method in found.get("methods", [])
        for name, one in method["terms"].items()
    ]
    return MeasuredFile(
        place,
        "candidates of a preflight, on rows that nothing was fitted on",
        stored,
        terms,
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _short(field: str) -> str:
    return field.removeprefix("response_").removeprefix("vision_")
