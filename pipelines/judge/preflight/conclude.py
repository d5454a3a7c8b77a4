"""The verdict: everything that speaks against the job, what it will cost, and what goes into kd.toml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.capture.skipped_samples import excess
from pipelines.inspect.cache import status
from pipelines.judge.plan.run import PlanRequest, estimate
from pipelines.judge.plan.teacher_cost import Speed
from pipelines.judge.preflight.chosen import Chosen
from pipelines.judge.preflight.request import Notebook, PreflightRequest
from pipelines.judge.preflight.student_side import StudentRead
from teacher_cache.errors import KdcliError
from teacher_cache.reading.cache import TeacherCache


@dataclass(frozen=True)
class Conclusion:
    """What was chosen, what the methods say, how exactly the teacher repeats itself (the canaries' receipt), and on how many samples."""

    chosen: Chosen
    methods: list[dict[str, Any]]
    canaries: dict[str, Any]
    samples: dict[str, Any]


def conclude(
    request: PreflightRequest, read: StudentRead, notebook: Notebook, cache: TeacherCache, found: Conclusion
) -> dict[str, Any]:
    """One JSON-able object, see ``run.preflight``."""
    summary = status(cache)
    columns = summary["columns"]
    fields = {name.removeprefix("fields/"): one for name, one in columns.items() if name != "samples"}
    a_sample = {name: one["bytes"] / max(1, one["written"]) for name, one in fields.items()}
    reasons = [found.chosen.why] if found.chosen.why else []
    reasons += [f"{one['method']}: {reason}" for one in found.methods for reason in one["reasons"]]
    reasons += read.problems
    reasons += excess(cache, list(columns), request.settings.capture.allow_skips)
    if not columns["samples"]["written"]:
        reasons.append("no sampled row could be captured: run `kdcli doctor`")
    speed = notebook.found.get("tokens_per_second")
    whole = whole_job(request, found.chosen.params, speed)
    reasons += [whole["error"]] if "error" in whole else []
    return {
        "go": not reasons,
        "reasons": list(dict.fromkeys(reasons)),
        "out": request.out,
        "cache": request.cache_url,
        "rows": {
            "sampled": summary["rows"],
            "written": columns["samples"]["written"],
            "skipped": columns["samples"]["skipped"],
            **{name: columns["samples"]["counts"].get(name, 0) for name in ("cut_rows", "cut_images")},
            **found.samples,
        },
        "budget": vars(request.budget),
        "choices": found.chosen.choices,
        "frontier": found.chosen.frontier,
        "params": found.chosen.params,
        "methods": found.methods,
        "bytes_per_sample": a_sample,
        "tokens_per_second": speed,
        "estimate": whole,
        "canaries": {name: found.canaries.get(name) for name in ("floor", "floor_logit", "dtype")},
    }


def whole_job(
    request: PreflightRequest, params: Mapping[str, Mapping[str, Any]], tokens_per_second: float | None
) -> dict[str, Any]:
    """``kdcli plan`` of the whole mixture with the bytes and the speed measured here; ``{"error"}`` where the job would be refused."""
    speed = Speed(tokens_per_second, gpus=request.gpus)
    settings = request.settings.capture
    try:
        asked = PlanRequest(request.teacher, request.data, settings, params, {}, request.rows, request.cache_url, speed)
        return estimate(asked).to_json()
    except KdcliError as error:
        return {"error": f"the whole job: {error}"}
