"""Reads a mixture from end to end and says what is wrong with it, row by row. Needs no model.

Every row is checked as ``cache-teacher`` would: what is a defect here is a skip record there, for the same reason.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from pipelines.doctor_report import NOTES, DoctorReport, Example, Finding, PartReport, print_report
from teacher_cache.errors import SKIP_REASONS, SkipRow
from teacher_cache.records import RowGroup, Sample, SkipRecord
from teacher_cache.rows import check_sample, image_extension
from teacher_cache.sources import DataSpec, Source, open_source

__all__ = ["DoctorReport", "Example", "Finding", "PartReport", "examine", "print_report"]

GROUP_ROWS = 200
_DETAIL_CHARACTERS = 160
_GROUPS_AHEAD = 64  # enough for any machine's cores; a finished group waiting its turn holds only counts

Progress = Callable[[str, int, int], None]
"""Called with (part, rows done, rows in the part) after every group."""

TokenCounter = Callable[[Sample], int]
"""Tokens of a row, image tokens included; may raise SkipRow."""


@dataclass
class _Tally:
    """Counts of one group, merged into its part's in file order so that a report is the same on every run."""

    counts: Counter[str] = field(default_factory=Counter)
    found: list[tuple[str, Example]] = field(default_factory=list)
    ids: list[tuple[bytes, Example]] = field(default_factory=list)
    images: list[tuple[bytes, Example]] = field(default_factory=list)


def examine(
    specs: list[DataSpec],
    progress: Progress | None = None,
    max_examples: int = 5,
    token_counter: TokenCounter | None = None,
    max_length: int | None = None,
    workers: int | None = None,
) -> DoctorReport:
    """Check every row of every part.

    Args:
        max_examples: rows named per kind of finding.
        token_counter, max_length: given both, rows with more tokens are ``over_length``.
        workers: threads; default one a core. Pillow decodes outside the interpreter's lock.

    Raises:
        DataError: a part cannot be read at all.
    """
    check = _RowCheck(token_counter, max_length, threading.Lock())
    # Every part is opened first: a mistyped last path shows before an hour is spent on the first.
    opened = [(spec, open_source(spec)) for spec in specs]
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return DoctorReport(
            tuple(_examine_part(s, source, check, pool, progress, max_examples) for s, source in opened)
        )


def _examine_part(
    spec: DataSpec,
    source: Source,
    check: _RowCheck,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
    max_examples: int,
) -> PartReport:
    groups = source.scan(GROUP_ROWS)
    total = sum(group.rows for group in groups)
    merged = _Merged(max_examples)
    for tally in _in_order(pool, lambda group: _examine_group(spec, source, group, check), groups):
        merged.add(tally)
        if progress is not None:
            progress(spec.part, merged.counts["rows"], total)
    counts = merged.counts
    assert counts["rows"] == total, f"{spec.part}: the scan saw {total} rows, reading gave {counts['rows']}"
    shapes = {name: counts[name] for name in ("usable", "with_images", "text_only", "multi_turn", "multi_image")}
    return PartReport(
        spec.part,
        spec.path,
        total,
        **shapes,
        defects=merged.findings(SKIP_REASONS),
        notes=merged.findings(NOTES),
    )


def _in_order(
    pool: ThreadPoolExecutor, examine_group: Callable[[RowGroup], _Tally], groups: list[RowGroup]
) -> Iterator[_Tally]:
    """Like ``pool.map``, but only a few groups ahead: results and errors come early and memory stays bounded."""
    pending: deque[Future[_Tally]] = deque()
    try:
        for group in groups:
            pending.append(pool.submit(examine_group, group))
            if len(pending) > _GROUPS_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _examine_group(spec: DataSpec, source: Source, group: RowGroup, check: _RowCheck) -> _Tally:
    tally = _Tally()
    for row in source.read(group):
        example = Example(row.place, row.source_id, "")
        tally.counts["rows"] += 1
        if row.source_id:
            tally.ids.append((_digest(row.source_id.encode()), example))
        if isinstance(row, SkipRecord):
            tally.found.append((row.reason, Example(row.place, row.source_id, row.detail[:_DETAIL_CHARACTERS])))
            continue
        tally.images += [(_digest(image.data), example) for image in row.images]
        try:
            check(row, spec.max_image_pixels)
        except SkipRow as skip:
            tally.found.append((skip.reason, Example(row.place, row.source_id, skip.detail[:_DETAIL_CHARACTERS])))
            continue
        tally.found += [(kind, Example(row.place, row.source_id, seen)) for kind, seen in row.notes]
        tally.found += [("extension_differs", note) for note in _extension_notes(row)]
        tally.counts.update(_shape(row))
    return tally


@dataclass(frozen=True)
class _RowCheck:
    token_counter: TokenCounter | None
    max_length: int | None
    lock: threading.Lock

    def __call__(self, sample: Sample, max_image_pixels: int) -> None:
        check_sample(sample, max_image_pixels)
        if self.token_counter is None or self.max_length is None:
            return
        with self.lock:  # fast tokenizers raise "Already borrowed" when two threads meet in them
            tokens = self.token_counter(sample)
        if tokens > self.max_length:
            raise SkipRow("over_length", f"{tokens:,} tokens, limit {self.max_length:,}")


def _shape(sample: Sample) -> dict[str, int]:
    return {
        "usable": 1,
        "with_images": int(bool(sample.images)),
        "text_only": int(not sample.images),
        "multi_turn": int(sum(turn.role == "assistant" for turn in sample.turns) > 1),
        "multi_image": int(len(sample.images) > 1),
    }


def _extension_notes(sample: Sample) -> Iterator[Example]:
    for image in sample.images:
        named = os.path.splitext(image.name)[1].lower().removeprefix(".").replace("jpeg", "jpg")
        content = image_extension(image.data)
        if named in ("jpg", "png", "webp", "gif", "bmp") and content not in (named, "bin"):
            yield Example(sample.place, sample.source_id, f"{image.name!r} holds {content}")


def _digest(data: bytes) -> bytes:
    # 8 bytes: among a million rows a chance collision is a one in 30 million event, and the sets stay small.
    return hashlib.blake2b(data, digest_size=8).digest()


class _Merged:
    """A part's counts so far, the first examples of each kind, and what was seen (8 bytes an id or image)."""

    def __init__(self, max_examples: int):
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Example]] = {}
        self.max_examples = max_examples
        self.seen: dict[str, set[bytes]] = {"duplicate_ids": set(), "duplicate_images": set()}

    def add(self, tally: _Tally) -> None:
        self.counts.update(tally.counts)
        for kind, example in tally.found:
            self._note(kind, example)
        for kind, items in (("duplicate_ids", tally.ids), ("duplicate_images", tally.images)):
            for digest, example in items:
                if digest in self.seen[kind]:
                    self._note(kind, example)
                self.seen[kind].add(digest)

    def _note(self, kind: str, example: Example) -> None:
        self.counts[kind] += 1
        kept = self.examples.setdefault(kind, [])
        if kind == "columns_unused" and any(one.detail == example.detail for one in kept):
            return  # the first row of every set of columns: most files have one set in all rows
        if len(kept) < self.max_examples:
            kept.append(example)

    def findings(self, kinds: dict[str, str]) -> dict[str, Finding]:
        """Those of ``kinds`` that were found, in the order of ``kinds``."""
        return {kind: Finding(self.counts[kind], tuple(self.examples[kind])) for kind in kinds if kind in self.examples}
