"""Rows → N fixed slices, and the hash that every shard is bound to.

A slice is a list of row groups of one part. Groups are permuted by seed inside a part before slicing and slices are balanced
by estimated tokens, so no shard is all text-only or all long. The plan is written once as ``manifest.json``, never changed.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from teacher_cache.errors import CacheError, KdcliError, printable
from teacher_cache.records import RowGroup
from teacher_cache.shards.plain_files import MOST_MANIFEST
from teacher_cache.shards.schema import COUNT, require
from teacher_cache.shards.sealed import seal, unseal
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec, Source, open_source
from teacher_cache.templates import template_fingerprint

FORMAT_VERSION = 1
GROUP_ROWS = 500
_SPEC = {
    **dict.fromkeys(("part", "path", "template"), str),
    **dict.fromkeys(("image_root?", "format?"), (str, None)),
    "limit?": (COUNT, None),
    "max_image_pixels?": COUNT,
    "follow_links?": bool,
}
_GROUP = {**dict.fromkeys(("start", "rows", "characters", "images"), COUNT), "locator": dict}
_SHAPE = {
    "plan_hash": str,
    "parts": [{"spec": _SPEC, "fingerprint": {"files?": [dict]}, "rows": COUNT, "pictures?": [str]}],
    "slices": [{"part": str, "groups": [_GROUP]}],
    "preparation": dict,
    "seed": int,
    "derived?": ({"by": str}, None),
}
MOST_SHARD_ROWS = 1 << 20
"""A reader holds the index of a shard, and the order of the rows of sixteen."""
MOST_PARTS = 4096
"""Each is a source of its own, that somebody named."""
CHARACTERS_PER_TOKEN = 4
_KEY = re.compile(r"[0-9]{9,18}-[0-9a-f]*")


@dataclass(frozen=True)
class Part:
    """One mixture part as it was scanned: how to open it again, its fingerprint and its number of rows.

    ``pictures``: keys of some of its rows, where pictures lie outside of its files (``same_rows``); no part of the plan hash.
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


def make_plan(
    specs: Sequence[DataSpec],
    shards: int,
    preparation: Mapping[str, Any],
    seed: int,
    image_tokens: int,
    known: Plan | None = None,
) -> Plan:
    """Scan the mixtures and cut them into ``shards`` slices.

    Args:
        image_tokens: vision tokens of a typical image, only for balancing.
        known: a plan that is taken again where it was made of the same files and settings: files are then hashed, not scanned.
    """
    if shards < 1:
        raise KdcliError(f"--shards must be at least 1, got {shards}")
    names = [spec.part for spec in specs]
    if nameless := [name for name in names if not name.strip() or printable(name) != name or "\n" in name]:
        raise KdcliError(
            f"a part is called {nameless[0]!r}: its name must be text on one line: use --part or `part = …`"
        )
    if len(set(names)) != len(names):
        raise KdcliError(
            f"mixture parts must have different names, got {', '.join(names)}: use --part or `part = …` in kd.toml"
        )
    if known and (again := _again(known, specs, shards, preparation, seed)):
        return again
    scanned = [_scan(spec, shards) for spec in specs]
    if not any(part.rows for part, _ in scanned):
        raise KdcliError(f"the mixture holds no rows: {', '.join(spec.path for spec in specs)}")
    check_shards(shards, [part.rows for part, _ in scanned])
    filled = [(part, groups) for part, groups in scanned if part.rows]

    def cost(group: RowGroup) -> int:
        return group.characters // CHARACTERS_PER_TOKEN + group.images * image_tokens + group.rows

    counts = _shards_per_part(
        [sum(map(cost, groups)) for _, groups in filled], [part.rows for part, _ in filled], shards
    )
    slices: list[Slice] = []
    for (part, groups), count in zip(filled, counts):
        groups = list(groups)
        random.Random(f"{seed}:{part.spec.part}").shuffle(groups)
        slices += [Slice(part.spec.part, tuple(chosen)) for chosen in _balance(groups, count, cost)]
    if (most := max(one.rows for one in slices)) > MOST_SHARD_ROWS:
        raise KdcliError(
            f"--shards {shards} makes shards of {most:,} rows, at most {MOST_SHARD_ROWS:,} are read: give more --shards"
        )
    return Plan(tuple(part for part, _ in scanned), tuple(slices), preparation, seed)


def check_shards(shards: int, rows: Sequence[int]) -> None:
    """Every shard has a row, and rows of one part alone. rows: of each part; KdcliError naming what fits."""
    total, filled = sum(rows), sum(count > 0 for count in rows)
    if shards > total:
        raise KdcliError(
            f"--shards {shards} is more than the {total} rows of the mixture: use at most --shards {total}"
        )
    if shards < filled:
        raise KdcliError(
            f"--shards {shards}: a shard never straddles parts, so {filled} parts need at least that many shards"
        )


def _again(
    known: Plan, specs: Sequence[DataSpec], shards: int, preparation: Mapping[str, Any], seed: int
) -> Plan | None:
    """``known`` with the places where its files lie now, or None where anything that a plan is made of differs."""
    settings = len(known.slices), known.seed, known.preparation, known.derived
    if settings != (shards, seed, preparation, None) or len(known.parts) != len(specs):
        return None
    parts = []
    for part, spec in zip(known.parts, specs):
        if replace(part.spec, path=spec.path, image_root=spec.image_root) != spec:
            return None
        fingerprint = part_fingerprint(spec, open_source(spec))
        if not is_same_data(fingerprint, part.fingerprint):
            return None
        parts.append(Part(spec, fingerprint, part.rows))
    return replace(known, parts=tuple(parts))


def part_fingerprint(spec: DataSpec, source: Source) -> dict[str, Any]:
    """What binds a plan to a part: its files, and the template where that is one of ours."""
    return {**source.fingerprint(), **template_fingerprint(spec.template)}


def _scan(spec: DataSpec, shards: int) -> tuple[Part, list[RowGroup]]:
    source = open_source(spec)
    groups = source.scan(GROUP_ROWS)
    rows = sum(group.rows for group in groups)
    if rows and len(groups) < 2 * shards:
        # A small mixture in many shards: finer groups balance and mix better, and every shard gets at least one.
        groups = source.scan(max(1, rows // (4 * shards)))
    return Part(spec, part_fingerprint(spec, source), rows), groups


def _shards_per_part(costs: list[int], rows: list[int], shards: int) -> list[int]:
    """At least one shard a part, at most one a row, the rest by cost (largest remainder)."""
    counts = [1] * len(costs)
    for _ in range(shards - len(costs)):
        open_parts = [i for i in range(len(costs)) if counts[i] < rows[i]]
        counts[max(open_parts, key=lambda i: costs[i] / counts[i])] += 1
    return counts


def _balance(groups: list[RowGroup], count: int, cost: Any) -> list[list[RowGroup]]:
    """Greedy by falling cost into the lightest slice; inside a slice the shuffled order stands."""
    place = {id(group): i for i, group in enumerate(groups)}
    heap: list[tuple[int, int, int]] = [(0, 0, i) for i in range(count)]
    chosen: list[list[RowGroup]] = [[] for _ in range(count)]
    for group in sorted(groups, key=cost, reverse=True):
        weight, size, i = heapq.heappop(heap)
        chosen[i].append(group)
        heapq.heappush(heap, (weight + cost(group), size + 1, i))
    return [sorted(one, key=lambda group: place[id(group)]) for one in chosen]


def parse_plan(data: bytes, place: str) -> Plan:
    """The plan of a manifest; CacheError where it is damaged, edited or of another format version."""
    try:
        body = unseal(data, place)
        if body["format_version"] != FORMAT_VERSION:
            raise CacheError(
                f"{place}: format version {str(body['format_version'])!r}; this kdcli reads {FORMAT_VERSION}"
            )
        if len(body["parts"]) > MOST_PARTS:
            raise ValueError(f"{len(body['parts']):,} parts, at most {MOST_PARTS:,} are read")
        require(body, _SHAPE, place)
        parts = tuple(
            Part(DataSpec(**p["spec"]), p["fingerprint"], p["rows"], _checked_keys(p.get("pictures", ())))
            for p in body["parts"]
        )
        slices = tuple(Slice(s["part"], tuple(RowGroup(**group) for group in s["groups"])) for s in body["slices"])
        plan = Plan(parts, slices, body["preparation"], body["seed"], body.get("derived"))
        _check_counts(plan)
        if plan.plan_hash != body["plan_hash"]:
            raise CacheError(f"{place}: its content does not have its plan hash: it was edited or damaged; restore it")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CacheError(f"{place}: damaged manifest ({type(error).__name__}: {error})") from None
    return plan


def _check_counts(plan: Plan) -> None:
    """ValueError where slices are of no part, do not have its rows, or more than a reader can take."""
    rows = Counter[str]()
    for one in plan.slices:
        rows[one.part] += one.rows
        if one.rows > MOST_SHARD_ROWS:
            raise ValueError(f"a slice of {one.rows:,} rows, at most {MOST_SHARD_ROWS:,} are read")
    said = {part.spec.part: part.rows for part in plan.parts}
    if strange := rows.keys() - said.keys():
        raise ValueError(f"a slice of part {min(strange)!r}, which is not one of its parts")
    if len(said) != len(plan.parts):
        raise ValueError("two parts have one name")
    if wrong := [part for part, count in said.items() if rows[part] != count]:
        raise ValueError(f"part {wrong[0]!r} has {said[wrong[0]]:,} rows, its slices have {rows[wrong[0]]:,}")


def parts_with_images(slices: Sequence[Slice]) -> list[str]:
    """Parts of which any row names an image."""
    return sorted({one.part for one in slices if any(group.images for group in one.groups)})


def _checked_keys(keys: Sequence[str]) -> tuple[str, ...]:
    if strange := [key for key in keys if not _KEY.fullmatch(key)]:
        raise ValueError(f"{strange[0][:60]!r} is not the key of a row")
    return tuple(keys)


def write_plan(storage: Storage, plan: Plan) -> None:
    """Write ``manifest.json`` first, or check that the one there is the same plan; CacheError with a diff where it is not."""
    if not storage.exists("manifest.json"):
        if len(plan.parts) > MOST_PARTS:
            raise CacheError(
                f"{storage}: {len(plan.parts):,} parts, at most {MOST_PARTS:,}: make several caches of the mixture"
            )
        if len(data := plan.to_bytes()) > MOST_MANIFEST:
            raise CacheError(
                f"{storage}/manifest.json would have {len(data):,} bytes, at most {MOST_MANIFEST:,} are read: make several caches of "
                "the mixture"
            )
        if storage.put_new("manifest.json", data):
            return
    there = read_plan(storage)
    if there.plan_hash != plan.plan_hash:
        lines = difference(there.identity(), plan.identity())
        raise CacheError(f"{storage} holds another plan; choose another --out, or undo: " + "; ".join(lines))


def known_plan(storage: Storage) -> Plan | None:
    """The plan of a cache that may be there; one that cannot be read is left to ``write_plan`` to refuse."""
    try:
        return read_plan(storage)
    except CacheError:
        return None


def read_plan(storage: Storage) -> Plan:
    """The plan of a cache; CacheError where there is no cache."""
    try:
        return parse_plan(storage.read("manifest.json"), f"{storage}/manifest.json")
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError(
            f"{storage}: no cache here (no manifest.json): check the path, or run `kdcli cache-teacher`"
        ) from None


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
