"""Reads a mixture from end to end and says what is wrong with it, row by row. Needs no model; with one it knows more.

Every row is checked as ``cache-teacher`` would: what is a defect here is a skip record there, for the same reason.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future
from typing import Any

from pipelines.judge.doctor.advice import failing_alike
from pipelines.judge.doctor.report import NOTES, DoctorReport, Example, Finding, PartReport, print_report
from pipelines.judge.doctor.rows import Reading, RowExaminer, Tally
from pipelines.judge.doctor.workers import Submit, working
from teacher_cache.errors import SKIP_REASONS, KdcliError
from teacher_cache.records import RowGroup
from teacher_cache.sources import DataSpec

__all__ = ["DoctorReport", "Example", "Finding", "PartReport", "Reading", "examine", "print_report"]

GROUP_ROWS = 200
_GROUPS_AHEAD = 64  # enough for any machine's cores; a finished group waiting its turn holds only counts

Progress = Callable[[str, int, int], None]
"""Called with (part, rows done, rows in the part) before the first group, with 0, and after every group."""


def examine(
    specs: Sequence[DataSpec],
    progress: Progress | None = None,
    max_examples: int = 5,
    every_defect: bool = False,
    reading: Reading | None = None,
    workers: int | None = None,
) -> DoctorReport:
    """Check every row of every part.

    Args:
        max_examples: rows named per kind of finding. every_defect: of defects, all of them.
        reading: whose tokens the rows become: what its template and processor refuse, lengths and ends of answers are looked at too.
        workers: threads, or processes where rows are read with a tokenizer; default as many as pay.

    Raises:
        DataError: a part cannot be read at all. CompatibilityError: the model cannot use a part's template.
    """
    examiner = RowExaminer(specs, reading)
    scanned = [source.scan(GROUP_ROWS) for source in examiner.sources]
    rows = sum(group.rows for groups in scanned for group in groups)
    reports = []
    with working(examiner, rows, workers) as submit:
        for number, groups in enumerate(scanned):
            merged = _Merged(max_examples, every_defect, reading.show if reading else 0)
            reports.append(_examine_part(examiner, number, groups, submit, merged, progress))
    return DoctorReport(tuple(reports))


def _examine_part(
    examiner: RowExaminer,
    number: int,
    groups: Sequence[RowGroup],
    submit: Submit,
    merged: _Merged,
    progress: Progress | None,
) -> PartReport:
    spec, total = examiner.specs[number], sum(group.rows for group in groups)
    if progress is not None:
        progress(spec.part, 0, total)
    for tally in _in_order(submit, number, groups):
        merged.add(tally)
        if progress is not None:
            progress(spec.part, merged.counts["rows"], total)
    counts = merged.counts
    assert counts["rows"] == total, f"{spec.part}: the scan saw {total} rows, reading gave {counts['rows']}"
    shapes = {name: counts[name] for name in ("usable", "with_images", "text_only", "multi_turn", "multi_image")}
    defects = merged.findings(SKIP_REASONS)
    warnings = failing_alike(spec, total, counts["with_images"], defects, merged.pictured)
    if examiner.ends is not None:
        warnings += examiner.ends.warnings(spec.part, spec.template, merged.ends, counts["usable"])
    return PartReport(
        spec.part,
        spec.path,
        total,
        **shapes,
        defects=defects,
        notes=merged.findings(NOTES),
        warnings=tuple(warnings),
        shown=tuple(merged.shown),
    )


def _in_order(submit: Submit, number: int, groups: Sequence[RowGroup]) -> Iterator[Tally]:
    """Like ``pool.map``, but only a few groups ahead: results and errors come early and memory stays bounded."""
    pending: deque[Future[Tally]] = deque()
    try:
        for group in groups:
            pending.append(submit(number, group))
            if len(pending) > _GROUPS_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenExecutor:
        raise KdcliError(
            "a process that read rows died (the first error above, or it was killed for want of memory): free some memory and run it again"
        ) from None
    finally:
        for future in pending:
            future.cancel()


class _Merged:
    """A part's counts so far, the first examples of each kind, and what was seen (8 bytes an id or image)."""

    def __init__(self, max_examples: int, every_defect: bool, show: int):
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Example]] = {}
        self.pictured: Counter[str] = Counter()
        self.ends: Counter[tuple[str, int]] = Counter()
        self.shown: list[dict[str, Any]] = []
        self._most, self._every, self._show = max_examples, frozenset(SKIP_REASONS if every_defect else ()), show
        self._seen: dict[str, set[bytes]] = {"duplicate_ids": set(), "duplicate_images": set()}

    def add(self, tally: Tally) -> None:
        self.counts.update(tally.counts)
        self.pictured.update(tally.pictured)
        self.ends.update(tally.ends)
        self.shown += tally.shown[: self._show - len(self.shown)]
        for kind, example in tally.found:
            self._note(kind, example)
        for kind, items in (("duplicate_ids", tally.ids), ("duplicate_images", tally.images)):
            for digest, example in items:
                if digest in self._seen[kind]:
                    self._note(kind, example)
                self._seen[kind].add(digest)

    def _note(self, kind: str, example: Example) -> None:
        self.counts[kind] += 1
        kept = self.examples.setdefault(kind, [])
        if kind == "columns_unused" and any(one.detail == example.detail for one in kept):
            return  # the first row of every set of columns: most files have one set in all rows
        if kind in self._every or len(kept) < self._most:
            kept.append(example)

    def findings(self, kinds: dict[str, str]) -> dict[str, Finding]:
        """Those of ``kinds`` that were found, in the order of ``kinds``."""
        return {kind: Finding(self.counts[kind], tuple(self.examples[kind])) for kind in kinds if kind in self.examples}
