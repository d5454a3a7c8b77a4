"""Mixtures of any number of rows for ``scale.py``: tiny ones to be captured, and one with the lengths of LLaVA-1.5's to be planned.

Written row by row, in bounded memory; the same for the same arguments.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image

WORDS = (
    "a",
    "the",
    "of",
    "on",
    "in",
    "is",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "star",
    "chart",
    "bar",
    "left",
    "right",
    "above",
)
PICTURES = 64
"""Shared by all rows, as small as files are: what scale asks of pictures is that they are opened."""
PICTURE_EVERY = 16
"""One row in so many has a picture: its pixels are made anew for every row, which is what preparing costs."""
PLANNED_ROWS, PLANNED_TURNS, PLANNED_CHARACTERS = 665_298, 10, 115
"""Rows of mix665k; mean turns of a row and characters of a turn, which make its json about as large (1.0 GB)."""
TEXT_ONLY = 0.061
"""Share of mix665k's rows that have no picture (40,688 of 665,298)."""


def write_pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(PICTURES):
        PIL.Image.new("RGB", (8, 8), (number, 255 - number, 128)).save(folder / f"{number:02d}.png")


def turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


def tiny_rows(rows: int) -> Iterator[dict[str, Any]]:
    """A question of five words, an answer of three; a picture now and then."""
    draw = random.Random(rows)
    for number in range(rows):
        question, answer = " ".join(draw.choices(WORDS, k=5)), " ".join(draw.choices(WORDS, k=3))
        picture = {"image": f"{draw.randrange(PICTURES):02d}.png"} if number % PICTURE_EVERY == 0 else {}
        ask = turn("human", f"<image>\n{question}" if picture else question)
        yield {"id": str(number), **picture, "conversations": [ask, turn("gpt", answer)]}


def long_rows(rows: int) -> Iterator[dict[str, Any]]:
    """Several turns of a few sentences, nearly all rows with a picture."""
    draw = random.Random(rows)
    text = " ".join(draw.choices(WORDS, k=4000))
    for number in range(rows):
        picture = {} if draw.random() < TEXT_ONLY else {"image": f"{draw.randrange(PICTURES):02d}.png"}
        turns = []
        for at in range(2 * max(1, min(12, round(draw.expovariate(2 / PLANNED_TURNS))))):
            start = draw.randrange(len(text) // 2)
            said = text[start : start + max(1, round(draw.expovariate(1 / PLANNED_CHARACTERS)))]
            turns.append(turn("gpt" if at % 2 else "human", f"<image>\n{said}" if picture and not at else said or "a"))
        yield {"id": f"{number:09d}", **picture, "conversations": turns}


def write_mixture(rows: Iterator[dict[str, Any]], target: Path) -> None:
    """A LLaVA json; under its name when it is whole."""
    draft = target.with_suffix(".draft")
    with draft.open("w") as file:
        for number, row in enumerate(rows):
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(row))
        file.write("\n]\n")
    os.replace(draft, target)
