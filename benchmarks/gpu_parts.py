"""The questions of ``gpu_hour``, in order of worth."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """One question.

    Attributes:
        module, words, small: ``python -m module`` with ``words``, with ``small`` where the list is only tried; ``{device}`` is filled in.
        seconds: it is ended behind so many. figures: what the table shows, each by its keys in the result.
    """

    name: str
    module: str
    words: str
    small: str
    seconds: float
    figures: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def command(self, device: str, small: bool) -> list[str]:
        words = (self.small if small else self.words).format(device=device)
        return [sys.executable, "-m", self.module, *words.split()]

    def limit(self, small: bool) -> float:
        """Seconds; a try, on whatever machine, has four times as many."""
        return self.seconds * (4 if small else 1)


REAL = "--device {device} --shapes real"
PARTS = (
    Part(
        "tests",
        "benchmarks.gpu_tests",
        "--device {device}",
        "--device {device}",
        300,
        {"passed": ("passed",), "failed": ("failed",), "skipped": ("skipped",)},
    ),
    Part(
        "capture",
        "benchmarks.capture",
        f"{REAL} --rows 48 --repeats 1",
        "--device {device} --rows 64 --repeats 1",
        360,
        {"standard / bare": ("ratio_to_bare", "standard"), "compact / bare": ("ratio_to_bare", "compact")},
    ),
    Part(
        "step, live against cached",
        "benchmarks.step",
        f"{REAL} --repeats 2 --steps 2",
        "--device {device} --repeats 1 --steps 3",
        420,
        {
            "live / standard": ("ratios", "live / standard", "measured"),
            "live / exact": ("ratios", "live / exact", "measured"),
            "decoding standard / step": ("decode", "llava-kd standard", "of its own step"),
        },
    ),
    Part(
        "packing",
        "benchmarks.packing",
        f"{REAL} --batch 8 --steps 2 --repeats 2 --methods sft,llava-kd",
        "--device {device} --batch 8 --steps 1 --repeats 1 --methods sft",
        300,
        {name: ("results", name, "packed / unpacked") for name in ("sft", "llava-kd")},
    ),
    Part(
        "loss memory",
        "benchmarks.loss_memory",
        "--device {device}",
        "--device {device} --rows 64 --vocabulary 4096",
        240,
        {"worst / cross-entropy": ("worst",), "median / cross-entropy": ("median",)},
    ),
    Part(
        "em-kd",
        "benchmarks.method_steps",
        f"{REAL} --repeats 2 --steps 2 --only em-kd",
        "--device {device} --repeats 1 --steps 3 --only em-kd",
        360,
        {name: ("ratios", name, "measured") for name in ("em-kd exact", "em-kd 512 columns, standard")},
    ),
    Part(
        "EPIC",
        "benchmarks.method_steps",
        f"{REAL} --repeats 2 --steps 2 --only epic-tcd epic-lcd",
        "--device {device} --repeats 1 --steps 1 --batch 4 --only epic-tcd epic-lcd",
        300,
        {name: ("ratios", name, "measured") for name in ("epic-tcd", "epic-lcd")},
    ),
    Part(
        "matching",
        "benchmarks.matching",
        f"{REAL} --repeats 2 --steps 2",
        "--device {device} --repeats 1 --steps 1 --batch 4",
        300,
        {"exact / step": ("times", "exact", "share")},
    ),
    Part(
        "codecs on the host",
        "benchmarks.codec_speed",
        "--repeats 3",
        "--repeats 1 --width 256 --side 9 --response 20 --small-width 64",
        240,
        {f"{what}, ms a row": ("rows as calibrated", what, "version 2") for what in ("decode", "encode")},
    ),
)
