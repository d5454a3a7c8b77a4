"""Wrong answers among the training rows, as real mixtures have them: plausible, of the same kind, seeded and written down."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipelines.demo.questions import QuestionTurn, compare_turn, image_turns
from pipelines.demo.scenes import sample_scene
from pipelines.demo.text_turns import text_turn
from pipelines.demo.world import WorldRow

TRIES = 2000


@dataclass
class WrongAnswers:
    """Replaces a ``share`` (0 to 1) of all answers, each with its own chance.

    A wrong answer is the right answer to a question of the same family about another picture of the same split, of the
    same form (a number for a number, as long a word for a written word), so that its frequency says nothing.
    ``done`` lists what was replaced: ``{"row", "id", "turn", "family", "right", "wrong"}`` each; ``answers`` counts all that were seen.
    """

    share: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"wrong_answers {self.share}: give a share between 0 and 1")
        self.done: list[dict[str, Any]] = []
        self.answers = 0

    def apply(self, rows: Iterable[WorldRow]) -> Iterator[WorldRow]:
        """The rows, some of their answers replaced. Pictures and questions stay as they are."""
        rng = random.Random(f"wrong answers/{self.seed}")
        for index, row in enumerate(rows):
            turns = list(row.turns)
            self.answers += len(turns)
            for i, turn in enumerate(turns):
                if rng.random() < self.share and (wrong := another_answer(turn, row, rng)) is not None:
                    turns[i] = replace(turn, answer=wrong)
                    place = {"row": index, "id": row.id, "turn": i, "family": turn.family}
                    self.done.append({**place, "right": turn.answer, "wrong": wrong})
            yield replace(row, turns=tuple(turns))


def another_answer(turn: QuestionTurn, row: WorldRow, rng: random.Random) -> str | None:
    """A wrong answer of the same family and form; None where none was drawn in ``TRIES``."""
    for _ in range(TRIES):
        drawn = _drawn(turn, row, rng)
        if drawn is not None and drawn.answer != turn.answer and _form(drawn) == _form(turn):
            return drawn.answer
    return None


def _drawn(turn: QuestionTurn, row: WorldRow, rng: random.Random) -> QuestionTurn | None:
    if not row.scenes:
        return text_turn(rng)
    first, *more = (sample_scene(rng, "train", scene.kind) for scene in row.scenes)
    if more:
        return compare_turn(first, more[0], rng)
    return next(iter(image_turns(first, rng, 1, turn.family)), None)


def _form(turn: QuestionTurn) -> tuple[bool, bool, int | None]:
    """Number or word, capitals or not; of what is written, how long. Two questions of one form could have one answer."""
    answer = turn.answer
    written = turn.family == "reading" and (answer.isdigit() or answer.isupper())
    return answer.isdigit(), answer.isupper(), len(answer) if written else None
