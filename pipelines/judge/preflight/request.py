"""What ``kdcli preflight`` was asked, and what must be the same for a run to continue in the same folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.capture.profiles import chosen_fields
from pipelines.judge.preflight.budget import Budget
from pipelines.settings import CaptureSettings, Settings
from pipelines.train.stage_identity import start_hash
from student_train.compression import asked_for
from student_train.methods import method_module
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.planning.plan import difference
from teacher_cache.shards.places import place_of
from teacher_cache.shards.schema import require
from teacher_cache.shards.sealed import seal, unseal
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.backends import teacher_reads_images
from teacher_cache.teachers.transformers import TeacherSpec

LEAST_ROWS = 12
LADDER_KEYS = ("k", "step", "codec", "codec_version")
"""Parameters that the preflight chooses itself, whatever an earlier choice left in kd.toml."""
NOTEBOOK = "preflight.json"


@dataclass(frozen=True)
class PreflightRequest:
    """What is tried, and what passes.

    Attributes:
        settings: everything else of kd.toml; ``train.student`` is the student.
        rows: of the mixture that are captured, more where they hold too few tokens to fit on.
        out: folder or URL; the cache is ``out/cache``.
        budget: what is near enough, or cheap enough.
        gpus: of the real job. kd_file: written on GO; None: the block is shown instead.
    """

    teacher: TeacherSpec
    data: tuple[DataSpec, ...]
    settings: Settings
    methods: tuple[str, ...]
    out: str = "preflight"
    rows: int = 256
    budget: Budget = field(default_factory=Budget)
    gpus: int = 8
    kd_file: Path | None = None

    def __post_init__(self) -> None:
        place_of(self.out, "--out")
        if self.rows < LEAST_ROWS:
            raise KdcliError(
                f"--rows must be at least {LEAST_ROWS}, a third of them is held out to judge, got {self.rows}"
            )
        if self.gpus < 1:
            raise KdcliError(f"--gpus must be at least 1, got {self.gpus}")
        if not self.methods:
            raise KdcliError("--methods is empty: name at least one, e.g. --methods llava-kd (see `kdcli methods`)")
        for name in self.methods:
            method_module(name)
        if not self.settings.train.student:
            raise KdcliError(
                "no student: gradients are compared on the actual one; give --student MODEL, or `student = …` under [train] in kd.toml"
            )

    @property
    def student(self) -> str:
        assert self.settings.train.student is not None
        return self.settings.train.student

    @property
    def cache_url(self) -> str:
        return f"{place_of(self.out).text.rstrip('/')}/cache"

    @cached_property
    def images(self) -> bool:
        """Whether the teacher reads images."""
        return teacher_reads_images(self.teacher)

    def base_fields(self) -> dict[str, dict[str, Any]]:
        """Field → parameters before any choice."""
        return base_fields(self.settings.capture, self.settings.fields, self.images)

    def kept_params(self) -> dict[str, dict[str, Any]]:
        """``[fields.NAME]`` of kd.toml for captured fields; of those that a ladder decides, only what it leaves alone."""
        return kept_params(self.settings.capture, self.settings.fields, self.images)


def default_methods(teacher: TeacherSpec) -> tuple[str, ...]:
    """Tried where none is named."""
    return ("llava-kd", "kd") if teacher_reads_images(teacher) else ("kd",)


def base_fields(
    capture: CaptureSettings, params: Mapping[str, Mapping[str, Any]], images: bool
) -> dict[str, dict[str, Any]]:
    """Field → parameters before any choice: the profile's, and those of ``params`` that no ladder decides. images: as of
    ``chosen_fields``."""
    return chosen_fields(capture.store, capture.fields, kept_params(capture, params, images), images)


def kept_params(
    capture: CaptureSettings, params: Mapping[str, Mapping[str, Any]], images: bool
) -> dict[str, dict[str, Any]]:
    """``params`` of captured fields; of those that a ladder decides, only what it leaves alone."""
    captured = chosen_fields(capture.store, capture.fields, {}, images)
    ladder = {name for kind in ("response", "vision") if has_ladder(captured, kind) for name in names_of(kind)}
    return {
        name: {key: one for key, one in values.items() if name not in ladder or key not in LADDER_KEYS}
        for name, values in params.items()
        if name in captured
    }


def names_of(kind: str) -> tuple[str, str]:
    """The two fields that together tell a row kind's distributions."""
    return f"{kind}_topk", f"{kind}_hidden"


def has_ladder(fields: Mapping[str, Mapping[str, Any]], kind: str) -> bool:
    """Whether the profile stores this kind as head + sketch, whose fineness there is to choose."""
    topk, hidden = names_of(kind)
    return topk in fields and fields.get(hidden, {}).get("codec") == "sketch"


def identity(request: PreflightRequest, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the result but the rows themselves, JSON-able."""
    train = request.settings.train
    compression = asked_for(train)
    return {
        "rows": request.rows,
        "teacher": dict(fingerprint),
        "student": start_hash(request.student),
        "methods": {name: dict(request.settings.methods.get(name, {})) for name in request.methods},
        "fields": request.base_fields(),
        "parts_without_fields": list(request.settings.capture.parts_without_fields),
        "budget": vars(request.budget),
        "train": {"max_length": train.max_length, "bf16": train.bf16},
        **({"compressor": compression.entry()} if compression else {}),
    }


_MEASURED = {"label": str, "error": str, "angles": dict, "head_angles": dict}
_STEP = {
    "labels": dict,
    "fields": {...: dict},
    "field_bytes": {...: float},
    **dict.fromkeys(("kl", "angle"), (float, None)),
    **dict.fromkeys(("bytes_per_token", "bytes_per_sample"), float),
    "measured": bool,
}
_CHOICE = {"kind": str, "label": str, "fields": {...: dict}, "ladder": [_MEASURED], "reasons": [str]}
_NOTES = {"identity": dict, "found": {"choices?": [_CHOICE], "frontier?": [_STEP], "tokens_per_second?": float}}


class Notebook:
    """``OUT/preflight.json``: the identity of this preflight and what it has found so far, so that a re-run goes on."""

    def __init__(self, out: str, wanted: Mapping[str, Any], plan_hash: str | None = None):
        """plan_hash: of the rows; None: they are not known yet, all else is looked at."""
        self.storage = Storage(out)
        self.found: dict[str, Any] = {}
        self.identity = json.loads(json.dumps({**wanted, "plan_hash": plan_hash}))
        if self.storage.exists(NOTEBOOK):
            body = self.read(out)
            there = {"rows": wanted.get("rows"), **body["identity"]}  # which older ones do not tell
            there |= {} if plan_hash else {"plan_hash": None}
            if there != self.identity:
                lines = "; ".join(difference(there, self.identity)).replace("cache ", "there ")
                raise CacheError(f"{out} holds another preflight: {lines}: choose another --out, or remove that folder")
            self.found = body["found"]

    @staticmethod
    def read(out: str) -> dict[str, Any]:
        """``{"identity", "found"}``; CacheError where it is damaged."""
        place = f"{out}/{NOTEBOOK}"
        body: dict[str, Any] = require(unseal(Storage(out).read(NOTEBOOK), place), _NOTES, place)
        return body

    def note(self, name: str, value: Any) -> None:
        self.found[name] = value
        self.storage.put_bytes(seal({"identity": self.identity, "found": self.found}), NOTEBOOK)


def beside(cache_url: str) -> list[str]:
    """The notebook of the preflight whose own cache this is, if any: ``preflight/cache`` lies in its folder."""
    folder, _, name = place_of(cache_url).text.rpartition("/")
    beside_it = name == "cache" and folder and not folder.endswith("/")
    return [f"{folder}/{NOTEBOOK}"] if beside_it and Storage(folder).exists(NOTEBOOK) else []
