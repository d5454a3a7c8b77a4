"""What a plan takes for granted of the store, and how much that can change: a preflight chooses how finely is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.judge.fidelity.frontier import Configuration
from pipelines.judge.plan.weighing import Weigher
from pipelines.judge.preflight.ladder import FALLBACKS, candidates
from pipelines.judge.preflight.request import base_fields, has_ladder
from pipelines.settings import CaptureSettings
from pipelines.terminal.tables import human_bytes

KINDS = ("response", "vision")


def assumed(
    settings: CaptureSettings, params: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any], weigher: Weigher
) -> dict[str, Any]:
    """``{"store", "fields": field → parameters, "preflight": what it may choose → bytes of the whole cache}``.

    Args:
        params: ``[fields.NAME]`` of kd.toml. wanted: what is planned. The last is empty where nothing is left to choose: the store has no
        ladder, a preflight has chosen already (``calibration``), or bytes are measured on a cache.
    """
    base = base_fields(settings, params, weigher.images)
    ladders = [candidates(kind, base) for kind in KINDS if has_ladder(base, kind)]
    open_choice = ladders and not settings.calibration and weigher.like is None and not weigher.measured
    store = "" if settings.fields else settings.store
    rungs = rungs_of(ladders) if open_choice else {}
    sizes = {label: weigher.weigh(_with(base, rung)).bytes for label, rung in rungs.items()}
    return {"store": store, "fields": {name: dict(one) for name, one in wanted.items()}, "preflight": sizes}


def rungs_of(ladders: list[list[Configuration]]) -> dict[str, list[Configuration]]:
    """The ends of the ladder, of all row kinds alike: the coarsest and the finest sketch, and what is left where no sketch will do."""
    finest = -1 - len(FALLBACKS)
    return {ladders[0][at].label: [ladder[at] for ladder in ladders] for at in (0, finest, -1)}


def _with(base: Mapping[str, Mapping[str, Any]], rung: list[Configuration]) -> dict[str, Mapping[str, Any]]:
    return {**base, **{name: params for one in rung for name, params in one.fields.items()}}


def assumed_line(one: Mapping[str, Any], planned: int) -> str:
    """As one line of a report. planned: bytes of the cache as assumed."""
    store = f"--store {one['store']}" if one["store"] else "--fields"
    head = f"Assumes {store}: {_words(one['fields'])}"
    if not one["preflight"]:
        return f"{head}."
    rising = sorted(one["preflight"].items(), key=lambda rung: rung[1])
    sizes = [f"{human_bytes(size)} with {label}" for label, size in rising]
    return (
        f"{head}: {human_bytes(planned)}. `kdcli preflight` chooses how finely it is stored, for your student: "
        f"{', '.join(sizes[:-1])}, up to {sizes[-1]}."
    )


def _words(fields: Mapping[str, Mapping[str, Any]]) -> str:
    """``response_topk (k 8), affinity (layout factored)``"""
    each = [(name, ", ".join(f"{key} {value}" for key, value in params.items())) for name, params in fields.items()]
    return ", ".join(f"{name} ({values})" if values else name for name, values in each) or "no field"
