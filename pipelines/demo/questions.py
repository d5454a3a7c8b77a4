"""What is asked about a scene, and the one right answer. Every turn names the family it is scored under."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from pipelines.demo.scenes import CELLS, COLORS, SHAPES, Scene, Shape

SHAPE_FAMILIES = ("shapes_color", "shapes_shape", "shapes_count", "shapes_position")
IMAGE_FAMILIES = (*SHAPE_FAMILIES, "charts", "reading")
FAMILIES = (*IMAGE_FAMILIES, "text")
ORDINALS = ("first", "second", "third", "fourth")
CAPTION_REQUESTS = (
    "Describe the image.",
    "What is in this picture?",
    "Write a caption for this image.",
    "Give a short description of the image.",
)


@dataclass(frozen=True)
class QuestionTurn:
    question: str
    answer: str
    family: str


def image_turns(scene: Scene, rng: random.Random, count: int, family: str | None = None) -> list[QuestionTurn]:
    """Up to ``count`` different turns about one picture; families (or the one asked for) are drawn evenly."""
    pools: dict[str, list[QuestionTurn]] = {}
    for turn in _ALL_TURNS[scene.kind](scene):
        pools.setdefault(turn.family, []).append(turn)
    if family is not None:
        pools = {family: pools.get(family, [])}
    for pool in pools.values():
        rng.shuffle(pool)
    turns: list[QuestionTurn] = []
    while len(turns) < count and any(pools.values()):
        turns.append(pools[rng.choice([name for name, pool in pools.items() if pool])].pop())
    return turns


def at(cell: int) -> str:
    """``"at the top left"``, ``"in the center"``"""
    return f"{'in' if CELLS[cell] == 'center' else 'at'} the {CELLS[cell]}"


def _shape_turns(scene: Scene) -> list[QuestionTurn]:
    shapes = scene.shapes
    by_shape, by_color = Counter(s.shape for s in shapes), Counter(s.color for s in shapes)
    pairs = Counter((s.color, s.shape) for s in shapes)
    turns = [turn for s in shapes for turn in _one_shape_turns(s, by_shape, by_color, pairs)]
    turns.append(QuestionTurn("How many shapes are there?", str(len(shapes)), "shapes_count"))
    # One absent colour and one absent shape, so that "0" is an answer too, but not the usual one.
    absent_color = [c for c in COLORS if c not in by_color][scene.tint_seed % 2 :][:1]
    absent_shape = [s for s in SHAPES if s not in by_shape][scene.tint_seed % 2 :][:1]
    for color in [*by_color, *absent_color]:
        turns.append(QuestionTurn(f"How many {color} shapes are there?", str(by_color[color]), "shapes_count"))
    for shape in [*by_shape, *absent_shape]:
        plural = shape + ("es" if shape == "cross" else "s")
        turns.append(QuestionTurn(f"How many {plural} are there?", str(by_shape[shape]), "shapes_count"))
    return turns


def _one_shape_turns(s: Shape, by_shape: Counter, by_color: Counter, pairs: Counter):
    yield QuestionTurn(f"What color is the shape {at(s.cell)}?", s.color, "shapes_color")
    yield QuestionTurn(f"What shape is {at(s.cell)}?", s.shape, "shapes_shape")
    if by_shape[s.shape] == 1:
        yield QuestionTurn(f"What color is the {s.shape}?", s.color, "shapes_color")
        yield QuestionTurn(f"Where is the {s.shape}?", CELLS[s.cell], "shapes_position")
    if by_color[s.color] == 1:
        yield QuestionTurn(f"What shape is {s.color}?", s.shape, "shapes_shape")
        yield QuestionTurn(f"Where is the {s.color} shape?", CELLS[s.cell], "shapes_position")
    if pairs[s.color, s.shape] == 1:
        yield QuestionTurn(f"Where is the {s.color} {s.shape}?", CELLS[s.cell], "shapes_position")


def _chart_turns(scene: Scene) -> list[QuestionTurn]:
    bars = scene.bars
    pairs = [
        ("Which bar is the tallest?", max(bars, key=lambda b: b.value).color),
        ("Which bar is the shortest?", min(bars, key=lambda b: b.value).color),
        ("How many bars are there?", str(len(bars))),
        ("What is the highest value?", str(max(b.value for b in bars))),
        ("What is the lowest value?", str(min(b.value for b in bars))),
    ]
    for i, bar in enumerate(bars):
        pairs.append((f"What is the value of the {bar.color} bar?", str(bar.value)))
        pairs.append((f"Which bar has the value {bar.value}?", bar.color))
        pairs.append((f"What color is the {ORDINALS[i]} bar?", bar.color))
    return [QuestionTurn(question, answer, "charts") for question, answer in pairs]


def _reading_turns(scene: Scene) -> list[QuestionTurn]:
    number = scene.text.isdigit()
    unit = "digit" if number else "letter"
    whole = ("What number is written?", "Read the number.") if number else ("What is written?", "Read the letters.")
    turns = [QuestionTurn(question, scene.text, "reading") for question in whole]
    for i, character in enumerate(scene.text):
        turns.append(QuestionTurn(f"What is the {ORDINALS[i]} {unit}?", character, "reading"))
    turns.append(QuestionTurn(f"How many {unit}s are there?", str(len(scene.text)), "reading"))
    turns.append(QuestionTurn("What color is the writing?", scene.ink, "reading"))
    return turns


_ALL_TURNS = {"shapes": _shape_turns, "chart": _chart_turns, "reading": _reading_turns}


def caption(scene: Scene) -> str:
    """A dense description: everything that the questions could ask about."""
    if scene.kind == "shapes":
        parts = [f"a {s.color} {s.shape} {at(s.cell)}" for s in scene.shapes]
        return _joined(parts) + "."
    if scene.kind == "chart":
        parts = [f"a {b.color} bar of {b.value}" for b in scene.bars]
        return "a chart with " + _joined(parts) + "."
    what = "the number" if scene.text.isdigit() else "the letters"
    return f"{what} {scene.text} in {scene.ink}."


def compare_turn(first: Scene, second: Scene, rng: random.Random) -> QuestionTurn:
    """A question over two pictures of shapes."""
    counts = len(first.shapes), len(second.shapes)
    if rng.random() < 0.5:
        which = rng.randint(0, 1)
        return QuestionTurn(f"How many shapes are in the {ORDINALS[which]} image?", str(counts[which]), "compare")
    answer = "same" if counts[0] == counts[1] else ORDINALS[int(counts[1] > counts[0])]
    return QuestionTurn("Compare the images: which one has more shapes?", answer, "compare")


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
