"""The frontier that a preflight noted: read again, a step of it picked by a budget, said in three lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.judge.preflight.budget import Budget
from pipelines.judge.preflight.request import NOTEBOOK, Notebook, beside
from pipelines.terminal.tables import human_bytes
from teacher_cache.errors import KdcliError

Body = Mapping[str, Any]
FIRST = "run `kdcli preflight` first; it measures the settings within a budget"
NOTICED = 0.75
"""Of an angle: nearer ones are told as the same."""


def label_of(labels: Mapping[str, str]) -> str:
    """``top-8 + sketch 0.04``, or with the row kinds where they differ."""
    if len(set(labels.values())) == 1:
        return next(iter(labels.values()))
    return ", ".join(f"{label} of {kind} rows" for kind, label in labels.items())


def saved_steps(calibration: str | None, width: int) -> list[dict[str, Any]]:
    """The frontier of the preflight whose cache this is, or of ``preflight``, as ``choose.Step.to_json``; rising bytes.

    Raises:
        KdcliError: there is none, or it is of a teacher that is not ``width`` wide.
    """
    cache = calibration or "preflight/cache"
    if not (places := beside(cache)):
        raise KdcliError(f"there is no preflight of {cache}: {FIRST}")
    body = Notebook.read(places[0].removesuffix(f"/{NOTEBOOK}"))
    steps: list[dict[str, Any]] = body["found"].get("frontier", [])
    if not steps:
        raise KdcliError(f"{places[0]} holds no frontier: {FIRST}")
    there = body["identity"].get("teacher", {}).get("hidden_size")
    if there != width:
        raise KdcliError(f"{places[0]} is of a teacher {there} wide, this one is {width}: {FIRST}")
    return steps


def pick(steps: Sequence[Body], budget: Budget) -> int:
    """Number of the step: the cheapest that is near enough, or the nearest that is cheap enough; KdcliError naming the nearest there is."""
    shares = [budget.share(nan(one["angle"]), nan(one["kl"])) for one in steps]
    cheap = [n for n, one in enumerate(steps) if one["bytes_per_token"] <= (budget.bytes_per_token or 0)]
    near = [n for n, share in enumerate(shares) if share <= 1]
    if found := cheap if budget.bytes_per_token else near[:1]:
        return min(found, key=lambda n: shares[n])
    at = 0 if budget.bytes_per_token else min(range(len(steps)), key=lambda n: shares[n])
    raise KdcliError(f"{budget.asked()} cannot be met: the closest measured setting is {words(steps[at], None)}")


def step_lines(steps: Sequence[Body], at: int, total: float | None, samples: float) -> list[str]:
    """Three lines: step ``at``, and the nearest to it whose error is another one by a share that is noticed.

    Args:
        total: bytes of the whole cache at that step; None: not known. samples: of the mixture.
    """
    error = [one["kl"] if one["angle"] is None else one["angle"] for one in steps]
    up = next((n for n in range(at + 1, len(steps)) if error[n] <= NOTICED * error[at]), None)
    down = next((n for n in range(at - 1, -1, -1) if error[at] <= NOTICED * error[n]), None)
    names = {"Chosen": at, "Next step up": up, "Next step down": down}
    ends = {"Next step up": "Nothing finer was measured.", "Next step down": "Nothing cheaper was measured."}
    lines = []
    for name, number in names.items():
        if number is None:
            lines.append(ends[name])
            continue
        more = steps[number]["bytes_per_sample"] - steps[at]["bytes_per_sample"]
        size = None if total is None else total + more * samples
        lines.append(f"{name}: {words(steps[number], size)}")
    return lines


def words(one: Body, size: float | None) -> str:
    """``12.1 GB, 0.4° from the live gradient, 61.3 bytes a token (top-8 + sketch 0.04)``"""
    said = [human_bytes(size)] if size is not None else []
    if one["angle"] is not None:
        said.append(f"{'' if one['measured'] else 'about '}{one['angle']:.2g}° from the live gradient")
    elif one["kl"] is not None:
        said.append(f"{one['kl']:.2g} nats from the live teacher")
    said.append(f"{one['bytes_per_token']:,.1f} bytes a token")
    return f"{', '.join(said)} ({label_of(one['labels'])})"


def nan(value: float | None) -> float:
    return float("nan") if value is None else value
