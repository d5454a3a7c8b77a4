"""Which samples are compared, and each of them as the cache, the teacher and the student read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from student_train.dataset import check_same_response
from teacher_cache.errors import CompatibilityError, KdcliError, SkipSample
from teacher_cache.planning.plan import difference
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.records import Prepared, Sample
from teacher_cache.shards.commit import committed_shards


@dataclass(frozen=True)
class FidelitySample:
    """One sample of the cache. teacher: as the capture read it. records: field → what its reader gives."""

    key: str
    sample: Sample
    teacher: Prepared
    records: dict[str, Any]


def draw(counts: Sequence[int], samples: int, seed: int) -> list[tuple[int, int]]:
    """(shard position, row), one row of every shard in turn until there are enough: even over shards, a function of the seed.

    The first n of a larger draw are the draw of n, so that "the rows after these" are never among them.
    """
    random = np.random.default_rng(seed)
    shards = random.permutation(len(counts))
    orders = {int(shard): random.permutation(counts[shard]) for shard in shards}
    turns = max(counts, default=0)
    found = [(s, int(rows[turn])) for turn in range(turns) for s, rows in orders.items() if turn < len(rows)]
    return found[:samples]


def parts_with_fields(cache: TeacherCache, parts: Sequence[str] | None) -> tuple[str, ...]:
    """The asked parts, or those of which the cache holds any field."""
    if parts:
        cache.shards(parts)  # refuses an unknown part
        return tuple(parts)
    captured = {shard for name in cache.fields for shard in committed_shards(cache.storage, f"fields/{name}")}
    found = tuple(part for part in cache.parts() if captured & set(cache.shards([part])))
    if not found:
        raise KdcliError(f"{cache.storage}: no field of a teacher to compare: capture one with `kdcli cache-teacher`")
    return found


def capture_preparer(cache: TeacherCache, processor: Any, config: Any) -> Preparer:
    """The teacher's preparer with the capture's limits; CompatibilityError where rows would be prepared otherwise."""
    there = cache.plan.preparation
    preparer = Preparer.like(there, processor, config)
    if preparer.fingerprint() != there:
        lines = "; ".join(difference(there, preparer.fingerprint()))
        raise CompatibilityError(
            f"{cache.storage}: this teacher's processor does not prepare rows as the capture did: {lines}: "
            "give --teacher the model (and the library version) that made the cache"
        )
    return preparer


class FidelityReader:
    """Reads rows of some parts with some fields, prepared as the capture prepared them."""

    def __init__(self, cache: TeacherCache, parts: Sequence[str], fields: Sequence[str], preparer: Preparer):
        self.cached = CachedSamples(cache, parts, fields)
        self.cache, self.preparer = cache, preparer
        self._limits = cache.image_limits()

    def read(self, places: Sequence[tuple[int, int]]) -> list[FidelitySample]:
        return [self._one(*place) for place in places]

    def _one(self, position: int, number: int) -> FidelitySample:
        row = self.cached.read(position, number)
        prepared = self.prepare(row.sample, self.preparer)
        check_same_response(row.key, row.text, prepared.text)
        return FidelitySample(row.key, row.sample, prepared, row.fields)

    def prepare(self, sample: Sample, preparer: Preparer) -> Prepared:
        """A captured sample for teacher or student; CompatibilityError where this model cannot read it."""
        try:
            return preparer.prepare(sample, self.cache.template(sample.part), self._limits[sample.part])
        except SkipSample as skip:
            raise CompatibilityError(
                f"{sample.place} was captured, but this model cannot read it ({skip}): "
                "give a model with the capture's tokenizer and template"
            ) from None

    def student_rows(self, rows: Sequence[FidelitySample], preparer: Preparer) -> list[Prepared]:
        """The rows as the student reads them, with the teacher's response tokens, one by one."""
        found = []
        for row in rows:
            prepared = self.prepare(row.sample, preparer)
            check_same_response(row.key, row.teacher.text, prepared.text)
            found.append(prepared)
        return found


def same_grids(rows: Sequence[FidelitySample], student: Sequence[Prepared]) -> bool:
    """Whether vision token i of the student is vision token i of the teacher, in every row."""

    def grids(one: Prepared) -> list[list[tuple[int, int]]]:
        return [[view.grid for view in image.views] for image in one.layout]

    return all(grids(row.teacher) == grids(one) for row, one in zip(rows, student))
