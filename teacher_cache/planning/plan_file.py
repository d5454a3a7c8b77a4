"""``manifest.json``: the plan written first, read back and held against another."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from teacher_cache.errors import CacheError
from teacher_cache.planning.plan import FORMAT_VERSION, MOST_SHARD_ROWS, Part, Plan, Slice, difference
from teacher_cache.records import RowGroup
from teacher_cache.shards.plain_files import MOST_MANIFEST
from teacher_cache.shards.schema import COUNT, require
from teacher_cache.shards.sealed import unseal
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec

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
MOST_PARTS = 4096
"""Each is a source of its own, that somebody named."""
_KEY = re.compile(r"[0-9]{9,18}-[0-9a-f]*")


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
