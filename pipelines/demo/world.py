"""The demo world as rows of a mixture: captions to align on, multi-turn rows to train on, single held-out questions.

Every split draws from its own random stream, and a held-out scene never occurs in the other splits
(``scenes.split_of``).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.demo.questions import (
    CAPTION_REQUESTS,
    FAMILIES,
    IMAGE_FAMILIES,
    SHAPE_FAMILIES,
    QuestionTurn,
    caption,
    compare_turn,
    image_turns,
)
from pipelines.demo.scenes import Scene, sample_scene
from pipelines.demo.text_turns import text_turn

__all__ = ["FAMILIES", "IMAGE_FAMILIES", "SHAPE_FAMILIES", "WorldRow", "caption_rows", "heldout_rows", "train_rows"]

TEXT_SHARE = 0.08  # of the train rows have no picture
KIND_OF_FAMILY = {"charts": "chart", "reading": "reading"}  # every other image family asks about shapes


@dataclass(frozen=True)
class WorldRow:
    """One row before it is written: ``family`` only on held-out rows, which ask one question."""

    id: str
    scenes: tuple[Scene, ...]
    turns: tuple[QuestionTurn, ...]
    family: str | None = None

    @property
    def conversations(self) -> list[dict[str, str]]:
        """LLaVA turns; the first human turn carries one ``<image>\\n`` a picture."""
        said: list[dict[str, str]] = []
        for i, turn in enumerate(self.turns):
            images = "<image>\n" * len(self.scenes) if i == 0 else ""
            said.append({"from": "human", "value": images + turn.question})
            said.append({"from": "gpt", "value": turn.answer})
        return said

    @property
    def source(self) -> str:
        """``shapes``, ``chart``, ``reading`` or ``text``"""
        return self.scenes[0].kind if self.scenes else "text"


def caption_rows(count: int, seed: int) -> Iterator[WorldRow]:
    """Rows for the projector's pre-training: one request, one dense caption."""
    rng = random.Random(f"captions/{seed}")
    for i in range(count):
        scene = sample_scene(rng, "train")
        yield WorldRow(
            f"caption-{i:06d}", (scene,), (QuestionTurn(rng.choice(CAPTION_REQUESTS), caption(scene), "caption"),)
        )


def train_rows(count: int, seed: int, two_image_share: float = 0.0) -> Iterator[WorldRow]:
    """Multi-turn rows; ``two_image_share`` of them compare two pictures, ``TEXT_SHARE`` have none."""
    rng = random.Random(f"train/{seed}")
    for i in range(count):
        name, kind = f"train-{i:06d}", rng.random()
        if kind < TEXT_SHARE:
            yield WorldRow(name, (), tuple(text_turn(rng) for _ in range(rng.randint(1, 4))))
        elif kind < TEXT_SHARE + two_image_share:
            first, second = (sample_scene(rng, "train", "shapes") for _ in range(2))
            yield WorldRow(name, (first, second), (compare_turn(first, second, rng),))
        else:
            scene = sample_scene(rng, "train")
            yield WorldRow(name, (scene,), tuple(image_turns(scene, rng, rng.randint(3, 6))))


def heldout_rows(count: int, seed: int, families: tuple[str, ...] = FAMILIES) -> Iterator[WorldRow]:
    """Single questions, the families in turn, no question about the same scene twice."""
    rng = random.Random(f"heldout/{seed}")
    asked: set[tuple[str, str]] = set()
    index = 0
    while index < count:
        family = families[index % len(families)]
        row = _heldout_row(rng, family, f"heldout-{index:06d}")
        question = (row.scenes[0].key, row.turns[0].question) if row and row.scenes else None
        if row is None or question in asked:
            continue
        if question:
            asked.add(question)
        yield row
        index += 1


def _heldout_row(rng: random.Random, family: str, name: str) -> WorldRow | None:
    """None where the drawn scene has no question of this family."""
    if family == "text":
        return WorldRow(name, (), (text_turn(rng),), family)
    scene = sample_scene(rng, "heldout", KIND_OF_FAMILY.get(family, "shapes"))
    turns = image_turns(scene, rng, 1, family)
    return WorldRow(name, (scene,), tuple(turns), family) if turns else None
