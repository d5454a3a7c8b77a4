"""Text-only questions of the demo world: sums, facts and small string tasks, no picture needed."""

from __future__ import annotations

import random

from pipelines.demo.questions import ORDINALS, QuestionTurn
from pipelines.demo.scenes import COLORS, WORDS

CORNERS = {"triangle": 3, "square": 4, "circle": 0}
OPPOSITES = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "tallest": "shortest",
             "shortest": "tallest", "highest": "lowest", "lowest": "highest"}  # fmt: skip
MIXTURES = {("red", "blue"): "purple", ("blue", "yellow"): "green", ("red", "yellow"): "orange"}


def text_turn(rng: random.Random) -> QuestionTurn:
    """One question about numbers, words or the world's facts."""
    question, answer = rng.choice((_sum, _difference, _next, _letter, _spell, _fact, _larger, _count))(rng)
    return QuestionTurn(question, answer, "text")


def _sum(rng: random.Random) -> tuple[str, str]:
    a = rng.randint(0, 9)
    b = rng.randint(0, 9 - a)
    return f"What is {a} plus {b}?", str(a + b)


def _difference(rng: random.Random) -> tuple[str, str]:
    a = rng.randint(0, 9)
    b = rng.randint(0, a)
    return f"What is {a} minus {b}?", str(a - b)


def _next(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        n = rng.randint(0, 8)
        return f"Which number comes after {n}?", str(n + 1)
    letter = rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXY")
    return f"Which letter comes after {letter}?", chr(ord(letter) + 1)


def _letter(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS).upper()
    i = rng.randrange(len(word))
    return f"What is the {ORDINALS[i]} letter of {word}?", word[i]


def _spell(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    return f"Write {word} in capital letters.", word.upper()


def _fact(rng: random.Random) -> tuple[str, str]:
    kind = rng.randrange(3)
    if kind == 0:
        shape = rng.choice(list(CORNERS))
        return f"How many corners has a {shape}?", str(CORNERS[shape])
    if kind == 1:
        word = rng.choice(list(OPPOSITES))
        return f"What is the opposite of {word}?", OPPOSITES[word]
    pair = rng.choice(list(MIXTURES))
    a, b = rng.sample(pair, 2)
    return f"Which color do {a} and {b} paint make?", MIXTURES[pair]


def _larger(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(10), 2)
    return f"Which number is larger, {a} or {b}?", str(max(a, b))


def _count(rng: random.Random) -> tuple[str, str]:
    words = [rng.choice(list(COLORS)) for _ in range(rng.randint(1, 4))]
    return f"How many words are in: {' '.join(words)}?", str(len(words))
