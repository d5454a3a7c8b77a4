"""What there is to see: seeded scenes of the demo world, before any pixel is drawn.

A scene says *what* is shown (its ``key``) and *how exactly* (jitter, tint). The split of a scene is a hash of its key
alone, so a held-out scene can never be met in training, not even with another jitter or tint.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

IMAGE_SIZE = 96  # pixels a side
PATCH = 8  # pixels a side of one vision token
GRID = IMAGE_SIZE // PATCH  # 12 x 12 vision tokens

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 90, 220),
    "yellow": (235, 200, 30),
    "purple": (150, 60, 180),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
CELLS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (224, 226, 228),
    "cream": (250, 243, 224),
    "pale": (226, 238, 250),
}
_WORDS = (
    "ant ape arm art axe bag bat bed bee box boy bus cab cap car cat cow cup dog ear egg elf eye fan fig fly fox gem "
    "hat hen ice ink jam jar jet key kid leg lip log map mud net nut oak oil owl pan pen pie pig pot rat rug sea sky "
    "sun tea toy van web wig yak zip "
    "arch baby ball band bank barn bath bean bear bell bird boat bone book boot bowl bush cake calf cave city clay "
    "coal coat coin corn crab crow deer desk dish door dove drum duck dust fern film fire fish flag foot fork frog "
    "gate goat gold hand harp hill home horn iron jazz kite knot lake lamp leaf lily lion lock mask milk mint moon "
    "moth nest oven park path pear pony quiz rain ring road rock roof room rope rose sail salt sand seed ship shoe "
    "snow soap sock sofa star swan tent tree tube vase wall wave wind wing wolf wool yarn zero"
)
WORDS = tuple(_WORDS.split())


@dataclass(frozen=True)
class Shape:
    cell: int  # 0..8, row-major in the 3 x 3 layout
    color: str
    shape: str
    dx: int  # pixels off the cell's centre
    dy: int
    radius: int  # pixels


@dataclass(frozen=True)
class Bar:
    slot: int  # 0..3, columns of 24 pixels
    color: str
    value: int  # 1..9


@dataclass(frozen=True)
class Scene:
    """One picture. Only the fields of its ``kind`` are filled."""

    kind: str  # "shapes" | "chart" | "reading"
    background: str
    tint_seed: int
    shapes: tuple[Shape, ...] = ()
    bars: tuple[Bar, ...] = ()
    text: str = ""
    ink: str = ""
    x: int = 0  # pixels; left edge of the first character slot
    y: int = 0

    @property
    def key(self) -> str:
        """What the picture shows, without jitter, tint and background."""
        if self.kind == "shapes":
            return "shapes:" + ";".join(f"{s.cell},{s.color},{s.shape}" for s in self.shapes)
        if self.kind == "chart":
            return "chart:" + ";".join(f"{b.slot},{b.color},{b.value}" for b in self.bars)
        return f"reading:{self.text},{self.ink}"


def split_of(key: str) -> str:
    """``"heldout"`` for one scene in eight, else ``"train"``: a property of the scene, not of a list."""
    return "heldout" if hashlib.sha256(key.encode()).digest()[0] < 32 else "train"


def sample_scene(rng: random.Random, split: str, kind: str | None = None) -> Scene:
    """Draws scenes of ``kind`` (or of a random kind) until one belongs to ``split``."""
    kind = kind or rng.choices(("shapes", "chart", "reading"), (5, 3, 3))[0]
    while True:
        scene = _SAMPLERS[kind](rng)
        if split_of(scene.key) == split:
            return scene


def _sample_shapes(rng: random.Random) -> Scene:
    count = rng.choice((1, 2, 3, 3, 4, 4))
    # A small palette repeats attributes, so "how many red shapes" has answers above one.
    palette = rng.sample(list(COLORS), rng.choice((2, 3, 4, 6)))
    kinds = rng.sample(SHAPES, rng.choice((2, 3, 5)))
    shapes = tuple(
        Shape(cell, rng.choice(palette), rng.choice(kinds), rng.randint(-2, 2), rng.randint(-2, 2), rng.randint(12, 14))
        for cell in sorted(rng.sample(range(9), count))
    )
    return Scene("shapes", rng.choice(list(BACKGROUNDS)), rng.getrandbits(32), shapes=shapes)


def _sample_chart(rng: random.Random) -> Scene:
    count = rng.choice((2, 3, 4))
    first = rng.randint(0, 4 - count)
    bars = tuple(
        Bar(first + i, color, value)
        for i, (color, value) in enumerate(zip(rng.sample(list(COLORS), count), rng.sample(range(1, 10), count)))
    )
    return Scene("chart", rng.choice(list(BACKGROUNDS)), rng.getrandbits(32), bars=bars)


def _sample_reading(rng: random.Random) -> Scene:
    kind = rng.choices(("word", "code", "number"), (5, 2, 3))[0]
    if kind == "word":
        text = rng.choice(WORDS).upper()
    elif kind == "code":  # random letters: reading them cannot be guessed from a list of words
        text = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.choice((3, 4))))
    else:
        text = str(rng.randint(10, 99) if rng.random() < 0.5 else rng.randint(100, 999))
    x = PATCH * rng.randint(0, (IMAGE_SIZE - 24 * len(text)) // PATCH)
    return Scene(
        "reading", rng.choice(list(BACKGROUNDS)), rng.getrandbits(32), text=text, ink=_ink(rng), x=x,
        y=PATCH * rng.randint(1, 8),
    )  # fmt: skip


def _ink(rng: random.Random) -> str:
    return rng.choice(("red", "green", "blue", "purple", "black"))  # yellow ink on a light ground is hard to see


_SAMPLERS = {"shapes": _sample_shapes, "chart": _sample_chart, "reading": _sample_reading}
