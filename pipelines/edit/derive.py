"""``kdcli cache subset | merge``: a complete cache of rows, parts and fields that other caches have, without any teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.capture.executors import local
from pipelines.capture.presence import at_work
from pipelines.edit.choose_samples import ALL_ROWS, RowFilter, check_samples, choose, distinct_rows
from pipelines.edit.copy_shards import Copying, copy_descriptions, copy_missing
from pipelines.inspect.cache import status
from teacher_cache.errors import CacheError, CompatibilityError, KdcliError, naming_full_disk
from teacher_cache.planning.derived import Choice, derived_plan
from teacher_cache.planning.plan import Plan, difference
from teacher_cache.planning.plan_file import write_plan
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.commit import committed_shards
from teacher_cache.shards.storage import Storage

Progress = Callable[[str, int, int], None]


def subset(
    url: str,
    out: str,
    parts: tuple[str, ...] | None = None,
    fields: tuple[str, ...] | None = None,
    rows: RowFilter = ALL_ROWS,
    workers: int = 1,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """A new cache of some parts, fields and rows of one; run again to continue. Returns ``inspect_cache.status`` of it."""
    cache = TeacherCache(url)
    chosen = choose(cache, parts, rows)
    filtered = rows.to_json() | ({"parts": sorted(parts)} if parts is not None else {})
    return derive([cache], chosen, "subset", filtered, fields, out, workers, progress)


def merge(
    urls: Sequence[str],
    out: str,
    fields: tuple[str, ...] | None = None,
    keep: str | None = None,
    workers: int = 1,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """One cache of the rows of several; run again to continue. Returns ``inspect_cache.status`` of it.

    Args:
        keep: ``first``: a row that several hold is taken from the first of them; None: that is refused.
    """
    if len(urls) < 2:
        raise KdcliError("merge takes two caches at least; `kdcli cache subset` copies one")
    caches = [TeacherCache(url) for url in urls]
    for cache in caches[1:]:
        refuse_other_rows(caches[0], cache)
    for cache in caches:
        check_samples(cache, cache.parts())
    chosen = distinct_rows(caches, keep)
    return derive(caches, chosen, "merge", {"keep": keep} if keep else {}, fields, out, workers, progress)


def refuse_other_rows(first: TeacherCache, other: TeacherCache) -> None:
    """CompatibilityError with a diff where two caches do not make rows in the same way."""

    def rows_made(plan: Plan) -> dict[str, Any]:
        specs = [part.spec for part in plan.parts]
        return {one.part: {"template": one.template, "max_image_pixels": one.max_image_pixels} for one in specs}

    one, two = rows_made(first.plan), rows_made(other.plan)
    both = one.keys() & two.keys()
    here = {"preparation": other.plan.preparation, "parts": {name: two[name] for name in both}}
    there = {"preparation": first.plan.preparation, "parts": {name: one[name] for name in both}}
    if there != here:
        raise CompatibilityError(
            f"{first.storage} and {other.storage} were captured with different settings, so their rows do not go into one cache: "
            f"{two_sides(there, here)}"
        )


def two_sides(first: Any, other: Any) -> str:
    """``difference`` of two caches."""
    return "; ".join(difference(first, other)).replace(": cache ", ": first ").replace(", here ", ", other ")


def derive(
    caches: list[TeacherCache],
    choices: list[Choice],
    by: str,
    chosen_by: Mapping[str, Any],
    fields: tuple[str, ...] | None,
    out: str,
    workers: int,
    progress: Progress,
) -> dict[str, Any]:
    """Write the plan, the descriptions and every shard that is not there yet."""
    workers = local.worker_count(workers)
    if not choices:
        raise CacheError(f"{caches[0].storage}: these parts have no rows: name others with --parts")
    names = common_fields(caches, fields, choices)
    plan = derived_plan([cache.plan for cache in caches], choices, by, chosen_by)
    storage = Storage(out)
    # The first write: what can be refused is refused above.
    with naming_full_disk(storage), at_work(storage, f"cache {by}"):
        write_plan(storage, plan)
        hashes = copy_descriptions(caches[0], storage, plan.plan_hash, list(names))
        copy_missing(Copying(caches, storage, plan.plan_hash, choices, hashes, names), workers, progress)
    return status(TeacherCache(out))


def common_fields(
    caches: list[TeacherCache], asked: tuple[str, ...] | None, choices: Sequence[Choice]
) -> dict[str, frozenset[str]]:
    """Field → the parts that it covers, the same in every cache; an error with a diff and the fix where one differs."""
    names = list(asked) if asked is not None else sorted({name for cache in caches for name in cache.fields})
    found: dict[str, frozenset[str]] = {}
    for name in names:
        for cache in caches:
            if name not in cache.fields:
                raise CacheError(
                    f"{cache.storage}: no field {name}; it has {', '.join(sorted(cache.fields)) or 'none'}: add it with "
                    f"`kdcli cache add-field {cache.storage} --field {name}`, or name the fields to keep with --fields"
                )
        bodies = [{k: v for k, v in cache.fields[name].items() if k not in ("plan_hash", "sha256")} for cache in caches]
        for cache, body in zip(caches, bodies):
            if body != bodies[0]:
                raise CompatibilityError(
                    f"{caches[0].storage} and {cache.storage}: field {name} is not the same: {two_sides(bodies[0], body)}: "
                    f"leave it out with --fields, or `kdcli cache drop-field {cache.storage} {name}` and `add-field` it as in the "
                    f"first (parameters, teacher, and --calibration {caches[0].storage} where it has one)"
                )
        found[name] = covered_parts(caches, name, choices)
    return found


def covered_parts(caches: Sequence[TeacherCache], name: str, choices: Sequence[Choice]) -> frozenset[str]:
    """Parts that a field has, of all the chosen shards; CacheError where it has some shards of a part and lacks others."""
    done = [set(committed_shards(cache.storage, f"fields/{name}")) for cache in caches]
    there: dict[str, set[bool]] = {}
    for one in choices:
        there.setdefault(one.part, set()).add(one.shard in done[one.cache])
        if len(there[one.part]) > 1:
            cache = caches[one.cache]
            raise CacheError(
                f"{cache.storage}: field {name} has only some shards of part {one.part}"
                f"{' over these caches' if len(caches) > 1 else ''}: finish it with `kdcli cache add-field {cache.storage} "
                f"--field {name}`, or leave it out with --fields"
            )
    return frozenset(part for part, has in there.items() if True in has)
