"""How many answers of a source the teacher contradicts, and how many of them are probably wrong.

A teacher also contradicts right answers, and says itself how often: where its likeliest token has probability p, a right label is another
with 1 − p. So of N answers of which D are contradicted, u·N would be if all were right (u: the mean ``JudgedAnswer.doubt``). A share w
of wrong ones, nearly all of which are contradicted, makes D = N·(u + w·(1 − u)). Hence w = (D/N − u) / (1 − u).

It holds as far as the teacher's probabilities do. One that is too sure of itself makes the estimate too high.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipelines.judge.labels.answers import JudgedAnswer

MOST_DOUBT = 0.5
"""Of u. Where the teacher would contradict most right answers, a wrong one cannot be told from one in other words, and 1 / (1 − u) makes
noise of the estimate: none is given. Long free texts are so."""


@dataclass
class LabelTally:
    """Counts over the answers of one source; an answer of no token that counts is ``empty``, and in nothing else."""

    answers: int = 0
    empty: int = 0
    contradicted: int = 0
    tokens: int = 0
    outside: int = 0
    nll: float = 0.0
    doubt: float = 0.0

    def add(self, answer: JudgedAnswer) -> None:
        if not answer.tokens:
            self.empty += 1
            return
        self.answers += 1
        self.contradicted += answer.contradicted > 0
        self.tokens += answer.tokens
        self.outside += answer.outside
        self.nll += answer.nll
        self.doubt += answer.doubt

    def join(self, other: LabelTally) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def estimable(self) -> bool:
        return self.answers > 0 and self.doubt < MOST_DOUBT * self.answers

    @property
    def wrong(self) -> float:
        """Estimated number of wrong answers; below 0 where fewer are contradicted than the teacher itself expects. nan: no estimate."""
        return (self.contradicted - self.doubt) / (1 - self.doubt / self.answers) if self.estimable else math.nan

    @property
    def error(self) -> float:
        """Standard error of ``wrong`` by the number of contradictions alone."""
        return math.sqrt(self.contradicted) / (1 - self.doubt / self.answers) if self.estimable else math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain values; shares are of answers, ``nll`` is the mean of a label token in nats."""
        of = max(1, self.answers)
        return {
            "answers": self.answers,
            "empty": self.empty,
            "contradicted": self.contradicted / of,
            "expected": self.doubt / of,
            "nll": self.nll / max(1, self.tokens),
            "tokens": self.tokens,
            "outside": self.outside,
            "wrong": max(0.0, self.wrong) if self.estimable else None,
            "wrong_error": self.error if self.estimable else None,
        }
