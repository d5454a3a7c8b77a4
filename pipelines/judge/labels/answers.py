"""One answer of a row against the teacher: which of its tokens the teacher contradicts, and how surely.

The unit is an answer, the response tokens of one turn: a row of five turns may have one wrong one. The end token and white space behind an
answer do not count: that a teacher would have gone on says nothing of what stands there.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass

import numpy as np

from student_train.distributions import OfLabels
from student_train.sample_columns import answer_lengths
from teacher_cache.records import TextTokens


@dataclass(frozen=True)
class JudgedAnswer:
    """
    Attributes:
        turn: of the row, counted from 0 over all its turns. number: counted from 0 over its answers.
        first: its first token among the row's response tokens. tokens: how many count.
        nll: sum over these, nats. outside: how many of them the cache has no log-prob of; ``nll`` is at least what it says then.
        contradicted: tokens where the teacher's likeliest is another.
        doubt: what the teacher thinks it likely that a right answer is contradicted: Σ (1 − p of its likeliest token) from the first
            token to the first contradicted one.
        margin: the largest log p(likeliest) − log p(label), 0 where no token is contradicted. at: its token among the row's.
    """

    turn: int
    number: int
    first: int
    tokens: int
    nll: float
    outside: int
    contradicted: int
    doubt: float
    margin: float
    at: int

    @property
    def score(self) -> float:
        """The higher, the likelier the label is wrong; -inf where the teacher contradicts nothing.

        Of a teacher whose probabilities hold, a margin of m or more befalls a right token once in e^m times at most, and one of n tokens
        n times as often: so log n is taken off.
        """
        return self.margin - math.log(self.tokens) if self.contradicted else -math.inf


def answers_of(text: TextTokens, said: OfLabels, ends: Container[int]) -> Iterator[JudgedAnswer]:
    """The answers of one row. said: of its response tokens. ends: ids that do not count at the end of an answer."""
    ids, turns = text.response_ids.tolist(), text.turn[text.response].tolist()
    top, own = (column.double().numpy() for column in (said.log_likeliest, said.log_probs))
    other, known = said.likeliest.numpy() != np.asarray(ids, dtype=np.int64), said.known.numpy()
    first = 0
    for number, length in enumerate(answer_lengths(text)):
        stop = first + length
        while stop > first and ids[stop - 1] in ends:
            stop -= 1
        yield _answer(turns[first], number, slice(first, stop), top, own, other, known)
        first += length


def _answer(
    turn: int, number: int, rows: slice, top: np.ndarray, own: np.ndarray, other: np.ndarray, known: np.ndarray
) -> JudgedAnswer:
    count, wrong = rows.stop - rows.start, np.flatnonzero(other[rows])
    margins = (top[rows] - own[rows])[wrong]
    until = int(wrong[0]) + 1 if len(wrong) else count
    return JudgedAnswer(
        turn,
        number,
        rows.start,
        count,
        nll=float(-own[rows].sum()),
        outside=int(count - known[rows].sum()),
        contradicted=len(wrong),
        doubt=float(-np.expm1(top[rows][:until]).sum()),
        margin=max(0.0, float(margins.max())) if len(wrong) else 0.0,
        at=rows.start + (int(wrong[margins.argmax()]) if len(wrong) else 0),
    )
