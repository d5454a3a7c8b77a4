"""What ``kdcli preflight`` was asked, and what must be the same for a run to continue in the same folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.profiles import chosen_fields
from pipelines.settings import CaptureSettings, Settings
from pipelines.stage_identity import start_hash
from student_train.compression import asked_for
from student_train.methods import method_module
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.places import place_of
from teacher_cache.plan import difference
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
        rows: of the mixture that are captured. out: folder or URL; the cache is ``out/cache``.
        max_angle: degrees between whole gradients, cache against live. max_kl: nats, mean over rows of a kind.
        max_bytes: of all fields together, a sample; None: no limit.
        gpus: of the real job. kd_file: written on GO; None: the block is shown instead.
    """

    teacher: TeacherSpec
    data: tuple[DataSpec, ...]
    settings: Settings
    methods: tuple[str, ...]
    out: str = "preflight"
    rows: int = 256
    max_angle: float = 1.0
    max_kl: float = 0.005
    max_bytes: int | None = None
    gpus: int = 8
    kd_file: Path | None = None

    def __post_init__(self) -> None:
        place_of(self.out, "--out")
        if self.rows < LEAST_ROWS:
            raise KdcliError(
                f"--rows must be at least {LEAST_ROWS}, a third of them is held out to judge, got {self.rows}"
            )
        for name in ("max_angle", "max_kl", "max_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise KdcliError(f"--{name.replace('_', '-')} must be above 0, got {value}")
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


def identity(request: PreflightRequest, plan_hash: str, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the result, JSON-able."""
    train = request.settings.train
    compression = asked_for(train)
    return {
        "plan_hash": plan_hash,
        "teacher": dict(fingerprint),
        "student": start_hash(request.student),
        "methods": {name: dict(request.settings.methods.get(name, {})) for name in request.methods},
        "fields": request.base_fields(),
        "parts_without_fields": list(request.settings.capture.parts_without_fields),
        "max_angle": request.max_angle,
        "max_kl": request.max_kl,
        "max_bytes": request.max_bytes,
        "train": {"max_length": train.max_length, "bf16": train.bf16},
        **({"compressor": compression.entry()} if compression else {}),
    }


_MEASURED = {"label": str, "error": str, "angles": dict, "head_angles": dict}
_CHOICE = {"kind": str, "label": str, "fields": {...: dict}, "ladder": [_MEASURED], "reasons": [str]}
_NOTES = {"identity": dict, "found": {"choices?": [_CHOICE], "tokens_per_second?": float}}


class Notebook:
    """``OUT/preflight.json``: the identity of this preflight and what it has found so far, so that a re-run goes on."""

    def __init__(self, out: str, wanted: dict[str, Any]):
        self.storage = Storage(out)
        wanted = json.loads(json.dumps(wanted))
        place = f"{out}/{NOTEBOOK}"
        self.found: dict[str, Any] = {}
        if self.storage.exists(NOTEBOOK):
            body = require(unseal(self.storage.read(NOTEBOOK), place), _NOTES, place)
            if body["identity"] != wanted:
                lines = "; ".join(difference(body["identity"], wanted)).replace("cache ", "there ")
                raise CacheError(f"{out} holds another preflight: {lines}: choose another --out, or remove that folder")
            self.found = body["found"]
        self.identity = wanted

    def note(self, name: str, value: Any) -> None:
        self.found[name] = value
        self.storage.put_bytes(seal({"identity": self.identity, "found": self.found}), NOTEBOOK)
