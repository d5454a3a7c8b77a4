"""One pass over a cache: every answer against the teacher, counts by part and source, and the answers contradicted most.

Memory does not grow with the rows but for eight bytes a contradicted answer: the cut between suspected and not is known at the end alone.
Pictures are not read.
"""

from __future__ import annotations

import heapq
import math
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipelines.inspect.cache import token_text
from pipelines.judge.labels.answers import JudgedAnswer, answers_of
from pipelines.judge.labels.reading import ROWS_AT_A_TIME, Read, Reader, source_of
from pipelines.judge.labels.tally import LabelTally
from student_train.teacher_view import TeacherHeads
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSample

MOST_SOURCES = 200
"""Of a part; answers of further ones are counted together, as ``OTHERS``."""
OTHERS = "(others)"
Progress = Callable[[int, int], None]
Each = Callable[[CachedSample, list[JudgedAnswer]], None]


@dataclass(frozen=True)
class Suspect:
    """A contradicted answer as a person looks at it.

    Attributes:
        id: of the data. question: the user's last turn before it. label: the answer. token: of it, where the margin is largest; expected:
            the teacher's likeliest there. p_label: where it is not ``known``, at most this.
        spot: (position of its shard in ``Reader.shards``, row of it).
    """

    part: str
    source: str
    key: str
    place: str
    id: str
    answer: JudgedAnswer
    question: str
    label: str
    token: str
    expected: str
    p_expected: float
    p_label: float
    known: bool
    spot: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        names = ("part", "source", "key", "place", "id", "question", "label", "token", "expected", "p_expected")
        body = {name: getattr(self, name) for name in names} | {"p_label": self.p_label, "p_label_known": self.known}
        one = self.answer
        return body | {
            "turn": one.turn,
            "answer": one.number,
            "score": one.score,
            "contradicted_tokens": one.contradicted,
        }


@dataclass
class PartSurvey:
    """One part. rows: that were read. shards: (read, of the plan). sources: by name."""

    part: str
    shards: tuple[int, int]
    rows: int = 0
    sources: dict[str, LabelTally] = field(default_factory=dict)

    @property
    def whole(self) -> LabelTally:
        total = LabelTally()
        for one in self.sources.values():
            total.join(one)
        return total

    @property
    def estimable(self) -> list[LabelTally]:
        return [one for one in self.sources.values() if one.estimable]

    @property
    def wrong(self) -> float:
        """Estimated wrong answers of all sources that have an estimate (nan: none has). Ones below 0 count, else noise would add up."""
        return sum(one.wrong for one in self.estimable) if self.estimable else math.nan

    @property
    def error(self) -> float:
        """Standard error of ``wrong``."""
        return math.hypot(*(one.error for one in self.estimable)) if self.estimable else math.nan

    @property
    def wrong_of(self) -> int:
        """Answers that ``wrong`` is of."""
        return sum(one.answers for one in self.estimable)


@dataclass
class Survey:
    """What a pass found.

    Attributes:
        fields: that were read. notes: what it cannot say. worst: the answers with the highest scores, the highest first.
        cut: an answer with this score or more is suspected: as many as are estimated to be wrong; inf where none are.
        suspected: how many are. seconds: that the pass took.
    """

    cache: str
    fields: tuple[str, ...]
    notes: list[str]
    parts: list[PartSurvey]
    worst: list[Suspect] = field(default_factory=list)
    cut: float = float("inf")
    suspected: int = 0
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def wrong(self) -> float:
        return max(0.0, sum(part.wrong for part in self.parts if part.estimable))


def survey(
    cache: TeacherCache,
    worst: int = 20,
    parts: Sequence[str] | None = None,
    most_rows: int | None = None,
    each: Each | None = None,
    progress: Progress = lambda done, total: None,
) -> Survey:
    """Args:
        worst: answers that are kept to be looked at. most_rows: about as many are read, the first ones of every shard; None: all.
        each: called with every row and its answers.

    Raises:
        KdcliError: as ``Reader``. CacheError: a damaged shard, by its number and key.
    """
    began = time.perf_counter()
    reader = Reader(cache, parts)
    rows, signals = reader.open(), TeacherHeads.open(cache, reader.served, torch.device("cpu"))
    most = max(rows.counts, default=0) if most_rows is None else -(-most_rows // max(1, len(rows.counts)))
    found = _Found(reader, worst)
    total = sum(min(count, most) for count in rows.counts)
    for done, one in enumerate(reader.read(rows, signals, most), start=1):
        answers = list(answers_of(one.row.text, one.said, reader.ends))
        found.add(one, answers)
        if each:
            each(one.row, answers)
        if done % ROWS_AT_A_TIME == 0 or done == total:
            progress(done, total)
    return found.survey(time.perf_counter() - began)


class _Found:
    """Counts so far, and a heap of the worst."""

    def __init__(self, reader: Reader, worst: int):
        cache = reader.cache
        self.reader, self._worst = reader, worst
        self.parts = {
            part: PartSurvey(part, (len(reader.of_part(part)), len(cache.shards([part])))) for part in reader.parts
        }
        self._scores: dict[tuple[str, str], array[float]] = {}
        self._heap: list[tuple[float, int, Suspect]] = []
        self._seen = 0

    def add(self, one: Read, answers: Sequence[JudgedAnswer]) -> None:
        part = self.parts[one.row.sample.part]
        source = source_of(one.row.sample)
        if source not in part.sources and len(part.sources) >= MOST_SOURCES:
            source = OTHERS
        part.rows += 1
        tally = part.sources.setdefault(source, LabelTally())
        for answer in answers:
            tally.add(answer)
            if not answer.contradicted:
                continue
            self._scores.setdefault((part.part, source), array("d")).append(answer.score)
            self._seen += 1
            full = len(self._heap) >= self._worst
            if self._worst and not (full and answer.score <= self._heap[0][0]):
                item = (answer.score, -self._seen, suspect(self.reader, one, source, answer))
                heapq.heappushpop(self._heap, item) if full else heapq.heappush(self._heap, item)

    def survey(self, seconds: float) -> Survey:
        reader = self.reader
        made = Survey(str(reader.cache.storage), tuple(reader.served.names), reader.notes, list(self.parts.values()))
        made.worst = [one for *_, one in sorted(self._heap, key=lambda item: item[:2], reverse=True)]
        made.seconds = seconds
        made.cut, made.suspected = self._cut(round(made.wrong))
        return made

    def _cut(self, count: int) -> tuple[float, int]:
        """(the score of the ``count``-th worst answer of sources that have an estimate, answers of all sources that reach it)."""
        ranked = sorted(
            score
            for (part, source), own in self._scores.items()
            if self.parts[part].sources[source].estimable
            for score in own
        )
        if not count or not ranked:
            return float("inf"), 0
        cut = ranked[-min(count, len(ranked))]
        return cut, sum(score >= cut for own in self._scores.values() for score in own)


def suspect(reader: Reader, one: Read, source: str, answer: JudgedAnswer) -> Suspect:
    """The answer in words."""
    row, said, at, tokenizer = one.row, one.said, answer.at, reader.tokenizer
    sample = row.sample
    ids = row.text.response_ids.tolist()
    own = ids[answer.first : answer.first + answer.tokens]
    asked = [turn.text for turn in sample.turns[: answer.turn] if turn.role == "user"]
    return Suspect(
        sample.part,
        source,
        row.key,
        sample.place,
        sample.source_id,
        answer,
        question=asked[-1] if asked else "",
        label=tokenizer.decode(own).strip() if tokenizer is not None else " ".join(map(str, own)),
        token=token_text(tokenizer, ids[at]),
        expected=token_text(tokenizer, int(said.likeliest[at])),
        p_expected=float(said.log_likeliest[at].exp()),
        p_label=float(said.log_probs[at].exp()),
        known=bool(said.known[at]),
        spot=one.spot,
    )
