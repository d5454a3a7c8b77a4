"""Samples → N fixed slices, and the hash that every shard is bound to.

A slice is a list of row groups of one part. The plan is written once as ``manifest.json``, never changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from teacher_cache.records import RowGroup
from teacher_cache.shards.sealed import seal
from teacher_cache.sources import DataSpec

FORMAT_VERSION = 1
MOST_SHARD_ROWS = 1 << 20
"""A reader holds the index of a shard, and the order of the rows of sixteen."""


@dataclass(frozen=True)
class Part:
    """One mixture part as it was scanned: how to open it again, its fingerprint and its number of rows.

    ``pictures``: keys of some of its rows, where pictures lie outside of its files (``same_samples``); no part of the plan hash.
    """

    spec: DataSpec
    fingerprint: Mapping[str, Any]
    rows: int
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slice:
    """What one shard is made of: the number of the shard is the slice's place in the plan."""

    part: str
    groups: tuple[RowGroup, ...]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)


@dataclass(frozen=True)
class Plan:
    """The sample plan.

    Attributes:
        preparation: everything that decides how a row becomes tokens and pixels (templates' hashes, tokenizer, processor, limits).
        seed: of the group permutation.
        derived: None where the mixture was scanned. A cache made of other caches says ``by`` which command (``subset``, ``merge``),
            ``from`` which plans, by what ``filter``, and ``rows_sha256`` of the rows that this chose (``derived``).
    """

    parts: tuple[Part, ...]
    slices: tuple[Slice, ...]
    preparation: Mapping[str, Any]
    seed: int
    derived: Mapping[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        """What the plan hash covers: content, not the places where files happen to lie."""
        return {
            "format_version": FORMAT_VERSION,
            "parts": {
                part.spec.part: {
                    "rows": part.rows,
                    "template": part.spec.template,
                    "max_image_pixels": part.spec.max_image_pixels,
                    "data": _without_places(part.fingerprint),
                }
                for part in self.parts
            },
            "slices": [[s.part, [[group.start, group.rows] for group in s.groups]] for s in self.slices],
            "preparation": dict(self.preparation),
            "seed": self.seed,
            **({"derived": dict(self.derived)} if self.derived else {}),
        }

    @cached_property
    def plan_hash(self) -> str:
        return content_hash(self.identity())

    @cached_property
    def slice_rows(self) -> list[int]:
        """Rows of every shard, written or skipped."""
        return [one.rows for one in self.slices]

    def spec(self, part: str) -> DataSpec:
        return next(p.spec for p in self.parts if p.spec.part == part)

    def to_bytes(self) -> bytes:
        body = {
            "format_version": FORMAT_VERSION,
            "plan_hash": self.plan_hash,
            "parts": [_part_body(part) for part in self.parts],
            "slices": [asdict(one) for one in self.slices],
            "preparation": self.preparation,
            "seed": self.seed,
            **({"derived": self.derived} if self.derived else {}),
        }
        return seal(body)


def _part_body(part: Part) -> dict[str, Any]:
    """``follow_links`` and ``pictures`` only where there are any: other manifests stay, byte by byte, what they were before."""
    body = asdict(part)
    if not part.spec.follow_links:
        del body["spec"]["follow_links"]
    if not part.pictures:
        del body["pictures"]
    return body


def content_hash(value: Any) -> str:
    """sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _without_places(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Files count by size and hash: moving a mixture to another folder does not make another plan."""
    files = [{k: v for k, v in file.items() if k not in ("path", "name")} for file in fingerprint.get("files", [])]
    return {**fingerprint, "files": files}


def is_same_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two fingerprints of a part are of the same files, wherever they lie."""
    return _without_places(one) == _without_places(other)


def parts_with_images(slices: Sequence[Slice]) -> list[str]:
    """Parts of which any row names an image."""
    return sorted({one.part for one in slices if any(group.images for group in one.groups)})


def difference(there: Any, here: Any, name: str = "", most: int = 8) -> list[str]:
    """Readable lines ``name: cache X, here Y`` for every leaf that differs, at most ``most`` of them."""
    lines: list[str] = []
    _collect(there, here, name, lines)
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more differences"]


def _collect(there: Any, here: Any, name: str, lines: list[str]) -> None:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted({*there, *here}):
            _collect(there.get(key, "absent"), here.get(key, "absent"), f"{name}.{key}" if name else str(key), lines)
    elif isinstance(there, list) and isinstance(here, list) and len(there) != len(here):
        lines.append(f"{name}: cache has {len(there)}, here {len(here)}")
    elif isinstance(there, list) and isinstance(here, list) and any(isinstance(one, Mapping) for one in there):
        for number, pair in enumerate(zip(there, here)):
            _collect(*pair, f"{name}.{number}", lines)
    elif there != here:
        lines.append(f"{name}: cache {_short(there)}, here {_short(here)}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:24]}…{text[-8:]}"
