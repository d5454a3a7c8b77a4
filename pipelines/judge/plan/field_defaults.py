"""What entropy-coded fields took where they were measured once: guesses for a teacher that nobody has measured yet."""

from __future__ import annotations

import math
from dataclasses import dataclass

from teacher_cache.errors import KdcliError
from teacher_cache.fields import Field

DEFAULT, ROUGH = "default, ±40 %", "default, rough"


@dataclass(frozen=True)
class Default:
    """What was measured once of a coded field: bytes a row and rank, at ``step``; both scale with (step / its own)^−power.

    Measured with ``kdcli cache-teacher`` on the shipped demo teacher (D = 256, V = 4,160) at steps 0.1, 0.04 and 0.02, and for response
    rows on a small language model too (D = 512, V = 32,768): the two agree within 20 %. No teacher of several billion parameters was at
    hand.
    """

    row: float
    rank: int
    step: float
    power: float

    def at(self, value: float, step: float) -> float:
        return float(value * (self.step / step) ** self.power)


DEFAULTS = {
    "response_hidden": Default(row=20.0, rank=100, step=0.1, power=0.6),
    "vision_hidden": Default(row=7.2, rank=82, step=0.1, power=0.65),
    "affinity": Default(row=32.0, rank=250, step=0.03, power=0.75),
}
ATTENTION_BYTES = 0.7
"""Of a probability, under zstd: 0.68 on the shipped demo teacher at step 0.05, pairs of text before the image included."""
TABLE_BYTES = 30_000
"""Of entropy tables in a calibration file, whatever the model."""


def default_basis(one: Field) -> str:
    return DEFAULT if one.calibrated else ROUGH


def default_bytes(one: Field, vocabulary: int, heads: int = 1) -> float:
    """Bytes a row by ``DEFAULTS``; a top-k's by its k and the bits of an id (15 at k = 8 and 78 at k = 50 for V = 32,768)."""
    if one.name.endswith("_topk") and one.calibrated:
        return float(3.6 + one.params["k"] * (1.49 + (math.log2(vocabulary) - 15) / 8))
    if one.name in DEFAULTS and one.calibrated:
        default = DEFAULTS[one.name]
        return default.at(default.row, one.params["step"])
    width = math.ceil(math.log2(vocabulary)) / 8
    if one.name.endswith("_topk"):
        return float(8 + one.params["k"] * (width + 0.75))
    if one.name == "attention":
        return ATTENTION_BYTES * (heads if one.params["heads"] == "each" else 1)
    if one.name.endswith("_sampled"):
        return sampled_bytes(one, width)
    raise KdcliError(
        f"field {one.name}: its bytes depend on the teacher's output, and there is no default: "
        "cache a few hundred rows with it and name that cache with --like"
    )


def sampled_bytes(one: Field, width: float) -> float:
    """Bytes a row of samples, ids of ``width`` bytes: k ids, half of them exact, or a fifth as many ids as draws.

    How many ids N draws give is the teacher's entropy: 50 draws gave 2 on the demo teacher and 28 on a flat language model.
    """
    if "draws" in one.params:
        return float(5 + one.params["draws"] / 5 * (width + 1))
    return float(10 + one.params["k"] * (width + 1))


def default_files(one: Field, width: int, vocabulary: int) -> dict[str, int]:
    """Bytes of the files that a calibrated field writes once, by role: ``calibration``, ``low_rank_head``."""
    if one.name not in DEFAULTS:
        return {"calibration": 4 * vocabulary + TABLE_BYTES}
    default = DEFAULTS[one.name]
    rank = min(width, round(default.at(default.rank, one.params["step"])))
    sizes = {"calibration": 4 * width * (rank + 2) + TABLE_BYTES}
    return sizes if one.name == "affinity" else {**sizes, "low_rank_head": vocabulary * (2 * rank + 4)}
