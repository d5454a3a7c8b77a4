"""The ways to store distributions that ``kdcli fidelity --sweep`` measures: each field family at several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.capture.profiles import HEAD_K
from pipelines.judge.fidelity.frontier import Configuration
from pipelines.judge.fidelity.stored import KINDS
from teacher_cache.codecs import row_codecs

STEPS = (0.4, 0.3, 0.2, 0.1, 0.05, 0.02)


def configurations(kinds: Sequence[str] = KINDS) -> list[Configuration]:
    """Every configuration of the sweep; those of codecs that this version lacks are left out."""
    return [one for kind in kinds for one in _of_kind(kind)]


def _of_kind(kind: str) -> list[Configuration]:
    topk, hidden, sampled = (f"{kind}_{suffix}" for suffix in ("topk", "hidden", "sampled"))

    def sketch(step: float) -> dict[str, Any]:
        return {"codec": "sketch", "step": step}

    ways: list[tuple[str, dict[str, dict[str, Any]]]] = []
    ways += [(f"top-{k}", {topk: {"k": k}}) for k in (12, 50, 128)]
    ways += [(f"threshold {k}", {sampled: {"sampler": "threshold", "k": k}}) for k in (8, 16, 50)]
    ways += [("random 50", {sampled: {"sampler": "random", "draws": 50}})]
    ways += [(f"top-{HEAD_K} + sketch {step:g}", {topk: {"k": HEAD_K}, hidden: sketch(step)}) for step in STEPS]
    ways += [(f"top-{k} + sketch 0.1", {topk: {"k": k}, hidden: sketch(0.1)}) for k in (4, 16)]
    ways += [(f"sketch {step:g}", {hidden: sketch(step)}) for step in STEPS[2:]]
    ways += [
        (f"{codec} hidden", {hidden: {"codec": codec}}) for codec in ("int4", "int8", "bf16") if codec in row_codecs()
    ]
    return [Configuration(kind, label, fields) for label, fields in ways]
