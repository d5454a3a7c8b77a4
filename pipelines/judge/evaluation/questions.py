"""What a held-out file asks, and what counts as an answer.

A row's references are its column ``answers`` (a list, of ten people's answers in VQA, of several spellings in DocVQA); without that
column, its last assistant turn. A row that ends with a question is asked if it has ``answers``; the first of them is then the expected
answer, whose nats are measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from teacher_cache.capturing.cache_shard import skip_record
from teacher_cache.errors import DataError, SkipSample
from teacher_cache.records import Sample, SkipRecord, Turn
from teacher_cache.sources import DataSpec, open_source
from teacher_cache.sources.row_values import ANSWERS
from teacher_cache.sources.usable_samples import check_sample


@dataclass(frozen=True)
class Questions:
    """Every row of a held-out file: those that are asked, and those that cannot be, with their reasons."""

    asked: list[Sample]
    skipped: list[SkipRecord]


def questions_of(spec: DataSpec, prompt_suffix: str = "") -> Questions:
    """The whole file, read before any model is loaded; DataError where no row can be asked."""
    asked: list[Sample] = []
    skipped: list[SkipRecord] = []
    for row in read_questions(spec):
        if isinstance(row, SkipRecord):
            skipped.append(row)
        else:
            asked.append(with_suffix(row, prompt_suffix))
    if not asked:
        raise nothing_asked(spec, skipped)
    return Questions(asked, skipped)


def nothing_asked(spec: DataSpec, skipped: Iterable[SkipRecord]) -> DataError:
    reasons = by_reason(one.reason for one in skipped)
    if not reasons:
        return DataError(f"{spec.path}: no row can be scored (it is empty)")
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    first = next(iter(skipped))
    return DataError(f"{spec.path}: no row can be scored ({listed}; the first, {first.place}: {first.detail})")


def by_reason(reasons: Iterable[str]) -> dict[str, int]:
    """Reason → rows, the most frequent first."""
    return dict(Counter(reasons).most_common())


def read_questions(spec: DataSpec) -> Iterator[Sample | SkipRecord]:
    """Rows of a held-out file that can be asked, each ending with the expected answer; the others as skip records."""
    source = open_source(spec)
    for group in source.scan(500):
        for row in source.read(group):
            if isinstance(row, SkipRecord):
                yield row
                continue
            try:
                yield _question(row, spec.max_image_pixels)
            except SkipSample as skip:
                yield skip_record(row, skip)


def _question(row: Sample, max_image_pixels: int) -> Sample:
    answers = _answers(row)
    if answers and row.turns and row.turns[-1].role == "user":
        row = replace(row, turns=(*row.turns, Turn("assistant", answers[0])))
    check_sample(row, max_image_pixels)
    if row.turns[-1].role != "assistant":
        raise SkipSample("no_answer", "the last question has nothing to be held against")
    return row


def references(row: Sample) -> tuple[str, ...]:
    """Of a row that can be asked: one at least."""
    return _answers(row) or (row.turns[-1].text,)


def _answers(row: Sample) -> tuple[str, ...]:
    """The column, empty where there is none; a single text or number counts as a list of one."""
    value = row.extra.get(ANSWERS, [])
    return tuple(value) if isinstance(value, list) else (str(value),)


def with_suffix(row: Sample, suffix: str) -> Sample:
    """The last question with a line more, as LLaVA's benchmarks append "Answer the question using a single word or phrase."."""
    asked = row.turns[-2]
    turns = (*row.turns[:-2], Turn(asked.role, f"{asked.text}\n{suffix}"), row.turns[-1])
    return replace(row, turns=turns) if suffix else row
