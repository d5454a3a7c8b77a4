"""Answers that the teacher contradicts most, with their pictures: probably errors of the mixture."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.judge.labels.advice import advise, percent
from pipelines.judge.labels.reading import Reader
from pipelines.judge.labels.show import notes, wrong_words
from pipelines.judge.labels.survey import Survey, Suspect, survey
from pipelines.report.gallery import GalleryExample, decode, example_of, kind_of, teller
from teacher_cache.errors import KdcliError, SkipSample
from teacher_cache.preparing.fingerprint import preparation_version
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.teacher_tokenizer import tokenizer_of
from teacher_cache.shards.commit import committed_shards

EXAMPLES = 6
ROWS_LOOKED_AT = 2000
"""Seconds of reading; ``kdcli doctor --cache`` looks at all."""


@dataclass(frozen=True)
class Contradicted:
    """One answer of one row: the row as the gallery shows it, but this answer and its question alone."""

    suspect: Suspect
    example: GalleryExample


@dataclass
class LabelSection:
    """rows: that were looked at, of so many written. lines: (part / source, answers, contradicted, expected, wrong) as text."""

    rows: int
    written: int
    lines: list[tuple[str, ...]]
    advice: list[str]
    examples: list[Contradicted] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def label_section(cache: TeacherCache, written: int) -> LabelSection | None:
    """None where no field tells what the teacher says of labels, or no row has any."""
    try:
        reader = Reader(cache)
    except KdcliError:
        return None  # nothing that the page could say: `kdcli doctor --cache` tells which field would
    try:
        made = survey(cache, EXAMPLES, most_rows=ROWS_LOOKED_AT)
    except KdcliError as error:  # damage: the rest of the page is worth having
        return LabelSection(0, 0, [], [], notes=[f"Not shown: {error}"])
    lines = [_line(part.part, name, one) for part in made.parts for name, one in sorted(part.sources.items())]
    if not any(part.whole.answers for part in made.parts):
        return None
    section = LabelSection(made.rows, written, lines, advise(made), notes=list(notes(made)))
    _show(cache, reader, made, section)
    return section


def _line(part: str, source: str, one: Any) -> tuple[str, ...]:
    name, of = " / ".join(filter(None, (part, source))), max(1, one.answers)
    shares = (percent(one.contradicted / of), percent(min(1.0, one.doubt / of)))
    return name, f"{one.answers:,}", *shares, wrong_words(one.wrong, of)


def _show(cache: TeacherCache, reader: Reader, made: Survey, section: LabelSection) -> None:
    done = [name for name in cache.fields if _has(cache, name, reader.shards)]
    vision = teller(done, "vision")
    rows = reader.open(pictures=True, extra=[vision] if vision else [])
    upright, tokenizer = preparation_version(cache.plan.preparation) > 1, tokenizer_of(cache)
    for one in made.worst:
        try:
            row = rows.read(*one.spot)
            found, answer = decode(cache, tokenizer, row, kind_of(row)), one.answer
            own = found.response[answer.first : answer.first + answer.tokens]
            shown = example_of(replace(found, response=own), set(), upright)
            asked = shown.turns[max(0, answer.turn - 1) : answer.turn + 1]
            section.examples.append(Contradicted(one, replace(shown, turns=asked)))
        except (KdcliError, SkipSample) as error:
            section.notes.append(f"{one.key}: {error}")


def _has(cache: TeacherCache, name: str, shards: list[int]) -> bool:
    return set(shards) <= set(committed_shards(cache.storage, f"fields/{name}"))
