"""What the codec benchmark is to show, and the configuration that shows it or comes nearest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from benchmarks.published import RECOMMENDED

Results = dict[str, dict[str, float]]
RECOMMENDED_NAME = "DistillKit recommended"


@dataclass(frozen=True)
class Targets:
    """share: of the bytes of a bfloat16 state, at which ``kl`` (nats) and ``angle`` (degrees, both directions) hold. kl_ratio, angle_ratio:
    how often smaller divergence and reverse angle are than DistillKit's at half its bytes. least: bytes at which the forward angle is below
    that of random sampling and the reverse one at most ``least_reverse``. int8: nats. soft_bytes, soft_kl: at temperature 4.
    """

    share: float
    kl: float
    angle: float
    kl_ratio: float
    angle_ratio: float
    least: float
    least_reverse: float
    int8: float
    soft_bytes: float
    soft_kl: float


SMALL = Targets(1 / 10, 0.005, 1.0, 10.0, 1.0, 36.0, 5.0, 0.0005, 200.0, 0.01)
"""Of models that were trained here."""
RELEASED = Targets(1 / 6, 0.008, 0.5, 12.0, 8.0, 58.0, 3.0, 0.0005, 200.0, 0.01)
"""Of a released language model."""


def judge(results: Results, wanted: Targets, vocabulary: int, width: int, sampling: str) -> dict[str, Any]:
    """Name of a target → the bytes that it allows, whether it is met, and of the best configuration its name and numbers."""
    ours = {name: one for name, one in results.items() if "with_container" in one}
    sketched = {name: one for name, one in ours.items() if "sketch" in name}
    told: dict[str, Any] = {}

    def add(name: str, allowed: float, excess: Any, columns: tuple[str, ...]) -> None:
        """excess: of a configuration, by what factor it misses what is asked most (1 and less: met)."""
        within = {key: excess(one) for key, one in sketched.items() if one["bytes"] <= allowed}
        best = min(within, key=within.__getitem__, default=None)
        said = {} if best is None else {"best": best, **{key: sketched[best][key] for key in ("bytes", *columns)}}
        told[name] = {"bytes_allowed": allowed, "met": best is not None and within[best] <= 1, **said}

    angles = ("forward_angle", "reverse_angle")
    add(
        "share_of_bf16",
        2 * width * wanted.share,
        lambda one: max(one["kl"] / wanted.kl, *(one[key] / wanted.angle for key in angles)),
        ("kl", *angles),
    )
    if other := results.get(RECOMMENDED_NAME):
        add(
            "half_of_distillkit",
            RECOMMENDED.bytes_per_row(vocabulary) / 2,
            lambda one: max(
                wanted.kl_ratio * one["kl"] / other["kl"],
                wanted.angle_ratio * one["reverse_angle"] / other["reverse_angle"],
            ),
            ("kl", "reverse_angle"),
        )
        if best := told["half_of_distillkit"].get("best"):
            pairs = {"kl_ratio": "kl", "angle_ratio": "reverse_angle"}
            told["half_of_distillkit"] |= {name: other[key] / results[best][key] for name, key in pairs.items()}
    bound = results[sampling]["forward_angle"]
    add(
        "least_bytes",
        wanted.least,
        lambda one: max(one["forward_angle"] / bound, one["reverse_angle"] / wanted.least_reverse),
        angles,
    )
    told["least_bytes"]["random_sampling_forward_angle"] = bound
    add("temperature_4", wanted.soft_bytes, lambda one: one["soft_kl"] / wanted.soft_kl, ("soft_kl",))
    kl = ours.get("hidden int8", {"kl": math.nan})["kl"]
    told["int8"] = {"met": kl <= wanted.int8, "kl": kl}
    return told
