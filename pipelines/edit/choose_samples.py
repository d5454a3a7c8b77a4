"""Which rows go into a cache that is made of others: filters of a subset, and rows that a merge finds twice. Reads indexes only."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.planning.derived import Choice, ordinals_of
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.records import SkipRecord
from teacher_cache.shards.commit import committed_shards
from teacher_cache.shards.index import Entry

NAMED = 3


@dataclass(frozen=True)
class RowFilter:
    """Which rows of ``samples`` a subset takes. Skip records belong to no such choice: they come along only where every row does.

    Attributes:
        keys: only these. images: True only rows with images, False only those without.
        fraction, max_rows: about that share, at most so many, by a hash of seed and key: the same rows whatever the shards.
    """

    keys: frozenset[str] | None = None
    images: bool | None = None
    fraction: float | None = None
    max_rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise KdcliError(f"--fraction must be above 0 and at most 1, got {self.fraction:g}")
        if self.max_rows is not None and self.max_rows < 1:
            raise KdcliError(f"--max-rows must be at least 1, got {self.max_rows}")

    @property
    def takes_all(self) -> bool:
        return all(one is None for one in (self.keys, self.images, self.fraction, self.max_rows))

    def draw(self, key: str) -> float:
        """A number in [0, 1) that depends on seed and key alone."""
        return int(hashlib.sha256(f"{self.seed}:{key}".encode()).hexdigest()[:13], 16) / 16**13

    def takes(self, entry: Entry) -> bool:
        """Whether a row passes everything but ``max_rows``."""
        return (
            (self.keys is None or entry.key in self.keys)
            and (self.images is None or self.images == (entry.vision_rows > 0))
            and (self.fraction is None or self.draw(entry.key) < self.fraction)
        )

    def to_json(self) -> dict[str, Any]:
        """What was asked for, nothing else."""
        keys = hashlib.sha256("\n".join(sorted(self.keys)).encode()).hexdigest() if self.keys is not None else None
        drawn = self.fraction is not None or self.max_rows is not None
        body = {"keys_sha256": keys, "images": self.images, "fraction": self.fraction, "max_rows": self.max_rows}
        return {name: value for name, value in body.items() if value is not None} | (
            {"seed": self.seed} if drawn else {}
        )


ALL_ROWS = RowFilter()


def read_keys(path: str) -> frozenset[str]:
    """The keys of a file, one a line; KdcliError where there is none."""
    try:
        keys = frozenset(Path(path).read_text().split())
    except (FileNotFoundError, UnicodeDecodeError, IsADirectoryError) as error:
        raise KdcliError(f"--keys {path}: not a text file of keys, one per line ({type(error).__name__})") from None
    if not keys:
        raise KdcliError(f"--keys {path}: holds no keys; write one per line, e.g. 000000012-3fa9c1d2")
    return keys


def choose(cache: TeacherCache, parts: tuple[str, ...] | None, rows: RowFilter) -> list[Choice]:
    """The rows that a subset takes of every shard; CacheError where a part or key is unknown, or no row is left."""
    names = cache.parts() if parts is None else list(dict.fromkeys(parts))
    shards = cache.shards(names)
    check_samples(cache, names)
    if rows.takes_all:
        every = {shard: set(ordinals_of(cache.column("samples"), shard)) for shard in shards}
        return choices_of(cache, every)
    unknown = set(rows.keys or ())

    def passing() -> Iterator[tuple[float, int, int]]:
        for shard in shards:
            # A fresh reader a shard: the index of the whole cache need not be in memory.
            for entry in cache.column("samples").entries(shard):
                unknown.discard(entry.key)
                if rows.takes(entry):
                    yield rows.draw(entry.key), shard, entry.ordinal

    taken = list(passing()) if rows.max_rows is None else heapq.nsmallest(rows.max_rows, passing())
    if unknown:
        raise CacheError(
            f"{cache.storage}: {len(unknown)} of the --keys are not in samples of part {', '.join(names)} "
            f"({shortened(sorted(unknown))}): remove them from the file"
        )
    if not taken:
        raise CacheError(f"{cache.storage}: no row of part {', '.join(names)} passes the filters: relax them")
    found: dict[int, set[int]] = {shard: set() for shard in shards}
    for _, shard, ordinal in taken:
        found[shard].add(ordinal)
    return choices_of(cache, found)


def choices_of(cache: TeacherCache, ordinals: Mapping[int, set[int]], number: int = 0) -> list[Choice]:
    """Shards with rows; one without any is no shard of the new cache."""
    slices = cache.plan.slices
    return [Choice(number, shard, slices[shard].part, frozenset(rows)) for shard, rows in ordinals.items() if rows]


def shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")


def check_samples(cache: TeacherCache, parts: Sequence[str]) -> None:
    missing = set(cache.shards(parts)) - set(committed_shards(cache.storage, "samples"))
    if missing:
        raise CacheError(
            f"{cache.storage}: {len(missing)} shards of samples are not captured yet: finish it first with `{cache.made_by()}`"
        )


def distinct_rows(caches: Sequence[TeacherCache], keep: str | None) -> list[Choice]:
    """Every row of all caches once; CacheError naming those that two hold, where ``keep`` does not say which to take."""
    choices: list[Choice] = []
    rows: dict[tuple[str, str], int] = {}
    skips: set[SkipRecord] = set()
    for number, cache in enumerate(caches):
        twice: list[tuple[str, str]] = []
        found: dict[int, set[int]] = {}
        for shard, part, keys, skipped in shard_rows(cache):
            found[shard] = {ordinal for key, ordinal in keys.items() if rows.setdefault((part, key), number) == number}
            twice += [(part, key) for key in keys if rows[part, key] != number]
            found[shard] |= {skip.ordinal for skip in skipped if not keep or skip not in skips}
            skips |= set(skipped) if keep else set()
        if twice and not keep:
            first = caches[rows[twice[0]]].storage
            named = shortened([f"{part} {key}" for part, key in twice])
            raise CacheError(
                f"{first} and {cache.storage} both hold {len(twice)} rows ({named}): merge caches of different rows, "
                "or keep the first cache's with --keep first"
            )
        choices += choices_of(cache, found, number)
    return choices


def shard_rows(cache: TeacherCache) -> Iterator[tuple[int, str, dict[str, int], tuple[SkipRecord, ...]]]:
    """(shard, part, key → ordinal, skip records) of every shard."""
    for shard, one in enumerate(cache.plan.slices):
        samples = cache.column("samples")
        keys = {entry.key: entry.ordinal for entry in samples.entries(shard)}
        yield shard, one.part, keys, samples.commit(shard).skipped
