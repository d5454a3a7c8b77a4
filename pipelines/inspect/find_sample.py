"""One row of a cache, by what a user has of it: its number in the cache or in the mixture, its key, or the id that the data gives it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.records import SkipRecord

Place = tuple[int, int]
"""(position of the shard in ``CachedSamples.shards``, row of it)."""


@dataclass(frozen=True)
class Asked:
    """Which row; one of the first four, else the first of the cache.

    Attributes:
        row: counted from 0 over the cache. source_row: counted from 0 over the files of ``part``, as doctor and skips count.
        id: of the data; the first row that has it. part: where several have that row or id.
    """

    row: int | None = None
    key: str | None = None
    source_row: int | None = None
    id: str | None = None
    part: str | None = None

    def __post_init__(self) -> None:
        names = ("row", "key", "source_row", "id")
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise KdcliError(f"{' and '.join(given)} each select a row: give only one of them")
        for name in ("row", "source_row"):
            if (getattr(self, name) or 0) < 0:
                raise KdcliError(f"--{name.replace('_', '-')} counts from 0, got {getattr(self, name)}")


def find_row(cache: TeacherCache, rows: CachedSamples, asked: Asked) -> Place:
    """Where that row lies; CacheError where it is not there, with the reason where the capture skipped it."""
    if asked.part is not None and asked.part not in cache.parts():
        raise CacheError(f"{cache.storage}: no part {asked.part!r}; it has {', '.join(cache.parts())}")
    if asked.key is not None:
        return _first(_by_key(rows, lambda key: key == asked.key), f"{cache.storage}: no sample with key {asked.key}")
    if asked.source_row is not None:
        return _source_row(cache, rows, asked)
    if asked.id is not None:
        return _by_id(cache, rows, asked)
    return _by_number(rows, asked.row or 0)


def _by_number(rows: CachedSamples, number: int) -> Place:
    for position, count in enumerate(rows.counts):
        if number < count:
            return position, number
        number -= count
    raise CacheError(f"the cache has {sum(rows.counts)} samples: --row counts from 0")


def _by_key(rows: CachedSamples, fits: Callable[[str], bool]) -> Iterator[Place]:
    for position, count in enumerate(rows.counts):
        yield from ((position, row) for row in range(count) if fits(rows.key(position, row)))


def _first(found: Iterator[Place], otherwise: str) -> Place:
    if (place := next(found, None)) is None:
        raise CacheError(otherwise)
    return place


def _source_row(cache: TeacherCache, rows: CachedSamples, asked: Asked) -> Place:
    found = {
        cache.plan.slices[rows.shards[place[0]]].part: place
        for place in _by_key(rows, lambda key: int(key.split("-")[0]) == asked.source_row)
    }
    if asked.part is None and len(found) > 1:
        raise CacheError(f"parts {', '.join(found)} each have a row {asked.source_row}: give --part as well")
    wanted = [place for part, place in found.items() if asked.part in (None, part)]
    what = f"row {asked.source_row}" + (f" of part {asked.part}" if asked.part else "")
    skipped = _skipped(cache, rows, asked, lambda one: one.ordinal == asked.source_row)
    return _first(iter(wanted), f"{cache.storage}: {what} is not in it{skipped}")


def _by_id(cache: TeacherCache, rows: CachedSamples, asked: Asked) -> Place:
    """Ids stand in no index: samples are read until one has it."""
    samples = cache.column("samples")
    for position, shard in enumerate(rows.shards):
        if asked.part not in (None, cache.plan.slices[shard].part):
            continue
        by_key = {samples.entries(shard).key(row): row for row in range(len(samples.entries(shard)))}
        for row in range(rows.counts[position]):
            members = samples.read(shard, by_key[rows.key(position, row)])
            if str(json.loads(members.get("json", b"{}")).get("source_id")) == asked.id:
                return position, row
    skipped = _skipped(cache, rows, asked, lambda one: one.source_id == asked.id)
    raise CacheError(f"{cache.storage}: no sample with id {asked.id!r}{skipped}")


def _skipped(cache: TeacherCache, rows: CachedSamples, asked: Asked, fits: Callable[[SkipRecord], bool]) -> str:
    """Why the capture left a row out, as words behind the error; "" where it did not."""
    samples = cache.column("samples")
    skips = (skip for shard in rows.shards for skip in samples.commit(shard).skipped)
    told = [
        f"{one.place} was skipped ({one.reason}: {one.detail})"
        for one in skips
        if fits(one) and asked.part in (None, one.part)
    ]
    return f": {'; '.join(told)}" if told else ""
