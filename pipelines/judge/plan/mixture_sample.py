"""A few hundred real rows of a mixture, prepared as the capture would: how long rows are, what of them is skipped, what a sample takes.

Only sizes are kept, so memory does not grow with the rows' pictures; a scan counts the rows of the whole mixture in bounded memory.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from time import perf_counter
from typing import Any

from pipelines.judge.plan.field_sizes import RowCounts
from pipelines.judge.plan.teacher_cost import tower_tokens
from teacher_cache.capturing.cache_shard import skip_record
from teacher_cache.errors import KdcliError, SkipSample
from teacher_cache.planning.make_plan import GROUP_ROWS, check_shards
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import RowGroup, Sample, SkipRecord
from teacher_cache.samples import encode_sample, left_out
from teacher_cache.sources import DataSpec, Source, open_source
from teacher_cache.teachers.label_ends import LabelEnds, OpenEnd

LEAST_OF_A_PART = 32
"""Rows prepared of a small part beside a large one."""


@dataclass(frozen=True)
class SampledRow:
    """What one usable row takes.

    Attributes:
        tokens: text and vision tokens. patches: tokens of the vision tower. image_bytes: of the encoded pictures.
        members: of its record in ``samples``, extension → bytes. cut: (turns, images) that a cut left out. end: what is wrong with the
            ends of its answers.
    """

    key: str
    ordinal: int
    counts: RowCounts
    tokens: int
    patches: int
    image_bytes: int
    members: Mapping[str, int]
    cut: tuple[int, int] = (0, 0)
    end: OpenEnd | None = None


@dataclass(frozen=True)
class PartSample:
    """One part of the mixture: how many rows it has or stands for, and the rows that were looked at.

    Attributes:
        scanned: rows in the files. rows: rows of the whole mixture that they stand for (the same without ``--rows``).
        characters: of text in the files. locator_bytes: of one row group in the plan. seconds: that reading and preparing the rows took.
    """

    part: str
    scanned: int
    rows: int
    characters: int
    locator_bytes: float
    usable: tuple[SampledRow, ...]
    skipped: tuple[SkipRecord, ...]
    seconds: float

    @property
    def read(self) -> int:
        return len(self.usable) + len(self.skipped)

    @property
    def weight(self) -> float:
        """Rows of the mixture that each sampled row stands for."""
        return self.rows / self.read if self.read else 0.0

    def total(self, measure: Callable[[SampledRow], float]) -> float:
        """Estimated sum of ``measure`` over the usable rows of the whole part."""
        return self.weight * sum(map(measure, self.usable))

    def skips(self) -> dict[str, float]:
        """Share of the rows by skip reason."""
        return {reason: count / self.read for reason, count in Counter(s.reason for s in self.skipped).most_common()}


@dataclass(frozen=True)
class Few:
    """How many rows are prepared in all, which (by seed), and into how many shards the whole mixture is to be cut."""

    rows: int
    seed: int = 0
    shards: int = 1


def parse_rows(texts: Sequence[str], parts: Sequence[str]) -> dict[str, int]:
    """``N`` (a mixture of one part) and ``PART=N`` → part → rows; KdcliError naming the parts."""
    counts = {}
    for text in texts:
        part, equals, number = text.rpartition("=")
        if not equals and len(parts) > 1:
            raise KdcliError(f"--rows {text}: the mixture has several parts, name one: --rows {parts[0]}={text}")
        part = part if equals else parts[0]
        if part not in parts:
            raise KdcliError(f"--rows {text}: no part {part!r}; the parts are {', '.join(parts)}")
        digits = number.replace(",", "").replace("_", "")
        if not digits.isdecimal() or int(digits) < 1:
            raise KdcliError(f"--rows {text}: write a number of rows, at least 1, e.g. --rows {part}=665298")
        counts[part] = int(digits)
    return counts


def sample_mixture(
    specs: Sequence[DataSpec],
    preparer: Preparer,
    rows: Mapping[str, int],
    few: Few,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ends: LabelEnds | None = None,
) -> list[PartSample]:
    """Scan every part and prepare about as many rows in all as ``few`` says, spread evenly over each part.

    Args:
        rows: part → rows of the whole mixture that its files stand for.
        progress: (rows prepared, rows to prepare). ends: looks at the ends of answers; None: nobody does.
    Raises:
        KdcliError: before any row is prepared, where the mixture has too few rows for the shards.
    """
    opened = [(spec, open_source(spec)) for spec in specs]
    scanned = [(spec, source, source.scan(GROUP_ROWS)) for spec, source in opened]
    sizes = {spec.part: sum(group.rows for group in groups) for spec, _, groups in scanned}
    if not sum(sizes.values()):
        raise KdcliError(f"the mixture holds no rows: {', '.join(spec.path for spec in specs)}")
    if empty := [part for part in rows if not sizes[part]]:
        raise KdcliError(f"--rows {empty[0]}=…: its file has no rows to represent them: add a few real rows")
    wanted = {part: rows.get(part, size) for part, size in sizes.items()}
    check_shards(few.shards, list(wanted.values()))
    shares = {p: max(LEAST_OF_A_PART, round(few.rows * n / sum(wanted.values()))) for p, n in wanted.items()}
    counts = {part: min(sizes[part], share) for part, share in shares.items()}
    done, total = 0, sum(counts.values())
    found = []
    for spec, source, groups in scanned:
        part = spec.part
        if any(group.images for group in groups):
            preparer.check_images(part, spec.template)
        usable: list[SampledRow] = []
        skipped: list[SkipRecord] = []
        locator = sum(len(json.dumps(asdict(g), indent=1)) for g in groups[:64]) / max(1, len(groups[:64]))
        began = perf_counter()
        for row in spread_rows(source, groups, sizes[part], counts[part], few.seed):
            one = look_at(row, spec, preparer, ends)
            (skipped if isinstance(one, SkipRecord) else usable).append(one)  # type: ignore[arg-type]
            done += 1
            progress(done, total)
        characters = sum(group.characters for group in groups)
        looked_at = (tuple(usable), tuple(skipped), perf_counter() - began)
        found.append(PartSample(part, sizes[part], wanted[part], characters, locator, *looked_at))
    return found


def spread_rows(
    source: Source, groups: Sequence[RowGroup], rows: int, count: int, seed: int
) -> Iterator[Sample | SkipRecord]:
    """About ``count`` rows at even distances: the first of as many row groups, which is all that is read of them."""
    if not count:
        return
    if len(groups) < count:
        groups = source.scan(max(1, rows // count))
    distance = max(1.0, len(groups) / count)
    at = random.Random(f"{seed}:sample").random() * distance
    while at < len(groups):
        yield from islice(source.read(groups[int(at)]), 1)
        at += distance


def look_at(
    row: Sample | SkipRecord, spec: DataSpec, preparer: Preparer, ends: LabelEnds | None = None
) -> SampledRow | SkipRecord:
    """The sizes of one row, or why it is not used."""
    if isinstance(row, SkipRecord):
        return row
    try:
        one = preparer.prepare(row, spec.template, spec.max_image_pixels)
    except SkipSample as skip:
        return skip_record(row, skip)
    members: dict[str, Any] = {ext: len(content) for ext, content in encode_sample(row, one).items()}
    counts = RowCounts(len(one.vision_positions), len(one.response_rows), len(one.text.ids))
    pictures = sum(size for ext, size in members.items() if ext[0].isdigit())
    patches = tower_tokens(one, preparer.config)
    end = ends.look(one, spec.template) if ends else None
    return SampledRow(one.key, row.ordinal, counts, len(one), patches, pictures, members, left_out(row, one), end)
