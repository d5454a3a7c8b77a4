"""Whether the rows that are read now are those that a cache was begun with: their turns, and the bytes of their pictures.

A plan binds the mixture's files by hash. Pictures that lie outside of them (LLaVA json, messages) it does not: under another image root,
or where files were replaced, the same rows show other pictures. So a manifest keeps the keys of some rows a part, which hash pictures too;
and what is written beside a shard's other columns is held against their keys, row by row.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from teacher_cache.errors import CacheError, DataError
from teacher_cache.planning.make_plan import part_fingerprint
from teacher_cache.planning.plan import Part, Plan, is_same_data
from teacher_cache.planning.plan_file import known_plan
from teacher_cache.records import RowGroup, Sample, SkipRecord
from teacher_cache.shards.commit import committed_shards, read_commit
from teacher_cache.shards.index import parse_index
from teacher_cache.shards.places import is_remote
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec, open_source
from teacher_cache.sources.files import expand_paths
from teacher_cache.sources.image_folder import ImageFolder
from teacher_cache.sources.usable_samples import row_key

MOST_PICTURED = 256
"""Rows of a part whose pictures a manifest binds. They are read whenever a capture begins, so they must be few."""
PICTURE_REASONS = ("image_missing", "image_path_unsafe", "image_too_large")
"""Why a source skips a row whose pictures it cannot read."""
Rows = Iterator[Sample | SkipRecord]


def spread_rows(read: Callable[[RowGroup], Rows], groups: Sequence[RowGroup], most: int) -> Rows:
    """About ``most`` rows: the first few of row groups at even distances. All rows where there are no more."""
    count = min(most, len(groups))
    for number in range(count):
        yield from islice(read(groups[number * len(groups) // count]), -(-most // len(groups)))


def has_pictures(row: Sample | SkipRecord) -> bool:
    """Whether the row, as a source reads it, names pictures."""
    return bool(row.images) if isinstance(row, Sample) else row.reason in PICTURE_REASONS


def groups_of(plan: Plan, part: str) -> list[RowGroup]:
    """The row groups of a part, in the order of its rows."""
    found = (group for one in plan.slices if one.part == part for group in one.groups)
    return sorted(found, key=lambda group: group.start)


def with_pictures(plan: Plan) -> Plan:
    """The plan with keys of some rows of every part whose pictures lie outside of its files.

    Raises:
        DataError: the mixture or its image root cannot be read.
    """
    return replace(plan, parts=tuple(replace(part, pictures=_pictures(plan, part)) for part in plan.parts))


def _pictures(plan: Plan, part: Part) -> tuple[str, ...]:
    """``{ordinal:09d}-{hash}`` of rows with pictures; nothing behind the dash where these cannot be read."""
    source = open_source(part.spec)
    if not isinstance(getattr(source, "images", None), ImageFolder):
        return ()

    def pictured(group: RowGroup) -> Rows:
        return filter(has_pictures, source.read(group))

    groups = [group for group in groups_of(plan, part.spec.part) if group.images]
    rows = spread_rows(pictured, groups, MOST_PICTURED)
    return tuple(row_key(row) if isinstance(row, Sample) else f"{row.ordinal:09d}-" for row in rows)


def bind_pictures(storage: Storage, plan: Plan, complete: bool = False) -> Plan:
    """The plan with the pictures that its rows have now; CacheError where the existing cache was begun with others."""
    try:
        plan = with_pictures(plan)
    except DataError:
        if complete:  # nothing is read of them any more
            return plan
        raise
    there = known_plan(storage)
    if there and there.plan_hash == plan.plan_hash:
        refuse_other_pictures(storage, there, plan, complete)
    return plan


def refuse_other_pictures(storage: Storage, there: Plan, here: Plan, complete: bool = False) -> None:
    """CacheError naming the first row whose pictures are not those that the manifest binds.

    Rows whose pictures were not there when the cache was begun may have any.

    Args:
        complete: nothing is captured any more, so pictures need not be there now.
    """
    fix = "give the --image-root of the capture, or choose another --out"
    begun = {part.spec.part: part for part in there.parts}
    for now in here.parts:
        before = begun[now.spec.part]
        keys = dict(_key_parts(before.pictures))
        for ordinal, digest in _key_parts(now.pictures):
            known = keys.get(ordinal)
            if not known or known == digest or (complete and not digest):
                continue
            row = f"{storage}: row {ordinal} of part {now.spec.part!r}"
            if not digest:
                raise CacheError(
                    f"{row} had pictures under {_root(before.spec)} when the cache was begun, and has none under "
                    f"{_root(now.spec)}: {fix}"
                )
            raise CacheError(
                f"{row} has other pictures under {_root(now.spec)} ({digest}) than those that the cache was begun with, "
                f"under {_root(before.spec)} ({known}): {fix}"
            )


def refuse_other_rows(storage: Storage, plan: Plan) -> None:
    """CacheError where rows that the plan binds stand otherwise in shards that are captured."""
    pictures = {part.spec.part: dict(_key_parts(part.pictures)) for part in plan.parts}
    roots = {part.spec.part: _root(part.spec) for part in plan.parts}
    for shard in committed_shards(storage, "samples"):
        recorded = RecordedSamples.of(storage, plan.plan_hash, shard, ())
        part = plan.slices[shard].part
        for ordinal, digest in pictures[part].items():
            known = recorded.keys.get(ordinal, "").partition("-")[2]
            if known and digest != known:
                raise CacheError(
                    f"{recorded.place}: row {ordinal} of part {part!r} has other pictures under {roots[part]} ({digest or 'none'}) than "
                    f"the one that is captured ({known}): give the --image-root of the capture"
                )


def _key_parts(keys: Sequence[str]) -> Iterator[tuple[int, str]]:
    for key in keys:
        ordinal, _, digest = key.partition("-")
        yield int(ordinal), digest


def _root(spec: DataSpec) -> str:
    return spec.image_root if spec.image_root is not None else f"the folder of {spec.path}"


@dataclass(frozen=True)
class RecordedSamples:
    """What the columns of a shard that stand already say of its rows; whatever is written beside them must agree.

    Attributes:
        place: of the shard, for messages. keys: ordinal → key. skips: ordinal → record, of ``samples``.
    """

    place: str = ""
    keys: Mapping[int, str] = field(default_factory=dict)
    skips: Mapping[int, SkipRecord] = field(default_factory=dict)

    @staticmethod
    def of(storage: Storage, plan_hash: str, shard: int, writing: Sequence[str], own: bool = False) -> RecordedSamples:
        """Args:
        writing: columns that are about to be written. own: these, too, must find their rows again.
        """
        columns = ["samples", *(f"fields/{name}" for name in storage.names("fields"))]
        keys: dict[int, str] = {}
        skips: dict[int, SkipRecord] = {}
        for column in columns:
            if column in writing and not own:
                continue
            try:
                commit = read_commit(storage, column, shard)
                if commit.plan_hash != plan_hash:
                    continue
                data = storage.read(f"{column}/index/{commit.index}")
                if hashlib.sha256(data).hexdigest() != commit.index_sha256:
                    continue
                entries = parse_index(data, commit.index, commit.tar_bytes, commit.written)
            except (CacheError, FileNotFoundError):
                continue  # not captured yet, or damaged: that is the business of ``verify``
            all_keys = entries.keys()
            keys |= {int(key.partition("-")[0]): key for key in all_keys}
            if column == "samples":
                if column not in writing:
                    skips = {skip.ordinal: skip for skip in commit.skipped}
                break  # the others hold no row that it does not
        return RecordedSamples(f"{storage} shard {shard:06d}", keys, skips)

    def agree(self, row: Sample, key: str) -> SkipRecord | None:
        """The skip record of a row that ``samples`` leaves out; CacheError where the row is another one than stands there."""
        if (known := self.keys.get(row.ordinal)) not in (None, key):
            raise CacheError(
                f"{self.place}: {row.place} is another row here ({key}) than the one that is captured ({known}): its text or its "
                "pictures changed: give data and --image-root as in the capture, or choose another --out"
            )
        return self.skips.get(row.ordinal)

    def skipped(self, record: SkipRecord) -> SkipRecord:
        """The record to write; CacheError where the row stands in the shard already."""
        if key := self.keys.get(record.ordinal):
            raise CacheError(
                f"{self.place}: {record.place} is captured ({key}), and cannot be used here ({record.reason}: {record.detail}): "
                "give data and --image-root as in the capture"
            )
        return self.skips.get(record.ordinal, record)


NOTHING = RecordedSamples()
"""Of a shard of which nothing stands."""


class SteadySamples:
    """A part's rows, refused where its files change while they are read.

    A time that changed is looked into: the same content under another time is the same data.

    Args:
        seen: absolute path → size in bytes and modification time in ns from before the plan hashed the files; those not there count from
            now.
    """

    def __init__(self, part: Part, seen: Mapping[str, list[int]]):
        self._part, self._source = part, open_source(part.spec)
        self._paths = ["" if is_remote(path) else os.path.abspath(path) for path in expand_paths(part.spec.path)]
        self._times = {path: seen.get(path) or _look(path) for path in self._paths}

    def read(self, group: RowGroup) -> Rows:
        """The rows of one group in order; DataError behind the last where its file is another than the one that was planned."""
        yield from self._source.read(group)
        path = self._paths[group.locator["file"]]
        if (now := _look(path)) != self._times[path]:
            here = part_fingerprint(self._part.spec, open_source(self._part.spec))
            if not is_same_data(here, self._part.fingerprint):
                raise DataError(
                    f"{path} changed while it was captured: restore it and run the command again, or choose another --out"
                )
            self._times[path] = now


def _look(path: str) -> list[int]:
    """Size in bytes and modification time in ns; of a file in a store nothing."""
    if not path:
        return []
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]
