"""Each method against the captured rows: what serves it, how far its losses and gradients are from live ones, the cost of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.judge.fidelity.compare import LIVE, compare, match_all
from pipelines.judge.fidelity.rows import FidelityReader, FidelitySample
from pipelines.judge.fidelity.sources import OutputSource, cache_source, live_source, serve_terms
from pipelines.judge.fidelity.student import Student
from pipelines.judge.fidelity.terms import MATCHING, MATCHING_NEEDS, TERMS
from pipelines.judge.preflight.ladder import terms_for
from pipelines.judge.preflight.request import PreflightRequest
from pipelines.judge.preflight.step_cost import step_cost
from pipelines.judge.preflight.student_side import StudentRead, row_id
from pipelines.train.stage_plans import StagePlan, plan_stages, row_aligned, settle_compressor
from student_train.methods import DEFAULT, create_method
from student_train.needs import Need, serve
from student_train.token_ids import check_vocabulary
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.complete_fields import complete_fields
from teacher_cache.records import TeacherOutput
from teacher_cache.teachers.transformers import TeacherSpec, load_processor

FLOOR = "floor"
CACHE = "cache"


@dataclass(frozen=True)
class LiveAnswers:
    """What the live teacher said.

    Attributes:
        outputs: of the student's rows, in batches. alone: the same, one sample at a time those whose whole gradients are compared.
        fitting: of other rows. head: W ``[V, D]`` on the CPU.
    """

    outputs: Sequence[TeacherOutput]
    alone: Sequence[TeacherOutput]
    fitting: Sequence[TeacherOutput]
    head: torch.Tensor


def needs_of(request: PreflightRequest, method: str) -> frozenset[Need]:
    return create_method(method, knobs=request.settings.methods.get(method, {})).needs()


def compare_terms(
    cache: TeacherCache,
    preparer: Preparer,
    student: Student,
    rows: Sequence[FidelitySample],
    answers: LiveAnswers,
    names: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Term → ``{"fields", "loss", "loss_error", "gradient_angle", "floor_error", "floor_angle"}`` from the cache itself.

    Args:
        rows: the student's, in its order. names: terms that some method needs.
    """
    parts = [part for part in cache.parts() if captured(cache, part)]
    fields = [name for name in complete_fields(cache, tuple(parts))] if parts else []
    chosen = [name for name in names if student.aligned or not TERMS[name].aligned]
    needs: dict[str, frozenset[Need]] = {name: TERMS[name].needs for name in chosen}
    if any(TERMS[name].matching for name in chosen):
        needs[MATCHING] = MATCHING_NEEDS
    served, _ = serve_terms(cache, needs, fields)
    chosen = [name for name in chosen if name in served]
    if not chosen:
        return {}
    records = records_of(cache, parts, fields, preparer, rows)
    head = answers.head.float() if student.device.type == "cpu" else answers.head  # once for both
    sources: dict[str, OutputSource] = {
        LIVE: live_source(answers.outputs, head, needs, student.device),
        CACHE: cache_source(cache, served, records, student.device),
        FLOOR: live_source(answers.alone, head, needs, student.device),
    }
    matches, _ = match_all(student, {LIVE: sources[LIVE]}) if MATCHING in needs else ({}, {})
    found = compare({name: TERMS[name] for name in chosen}, student, sources, matches)
    return {
        name: {
            "fields": served[name].names,
            "loss": one[LIVE]["loss"],
            "loss_error": one[CACHE]["loss_error"],
            "gradient_angle": one[CACHE]["gradient_angle"],
            "floor_error": one[FLOOR]["loss_error"],
            "floor_angle": one[FLOOR]["gradient_angle"],
        }
        for name, one in found.items()
    }


def captured(cache: TeacherCache, part: str) -> bool:
    return bool(cache.fields) and bool(complete_fields(cache, (part,)))


def records_of(
    cache: TeacherCache, parts: Sequence[str], fields: Sequence[str], preparer: Preparer, rows: Sequence[FidelitySample]
) -> list[dict[str, Any]]:
    """Decoded records of these rows, in their order; KdcliError where one was not captured."""
    reader = FidelityReader(cache, parts, fields, preparer)
    shards = reader.cached.shards
    places = {
        f"{cache.plan.slices[shards[position]].part}/{reader.cached.key(position, number)}": (position, number)
        for position, count in enumerate(reader.cached.counts)
        for number in range(count)
    }
    ids = [row_id(row) for row in rows]
    if lost := [one for one in ids if one not in places]:
        raise KdcliError(f"{cache.storage}: {len(lost)} compared rows were not captured: look at `kdcli cache status`")
    return [row.records for row in reader.read([places[one] for one in ids])]


def judge_method(
    request: PreflightRequest,
    cache: TeacherCache,
    method: str,
    read: StudentRead,
    terms: Mapping[str, Mapping[str, Any]],
    device: torch.device,
) -> dict[str, Any]:
    """``{"method", "served", "notes", "terms", "step", "reasons"}``; it can be trained where ``reasons`` is empty."""
    needs = needs_of(request, method)
    body: dict[str, Any] = {"method": method, "served": {}, "notes": [], "terms": {}, "step": None, "reasons": []}
    plans: list[StagePlan] = []
    try:
        plans = plan_stages(cache, method, request.settings, None, DEFAULT, None)
        plans = settle_compressor(plans, request.student)
        trusted = request.settings.train.trust_remote_code
        processor, _ = load_processor(TeacherSpec(request.student, trust_remote_code=trusted))
        body["notes"] += check_vocabulary(cache, {name for plan in plans for name in plan.served.names}, processor)
    except KdcliError as error:
        body["reasons"] += unserved(cache, method, needs, plans) or [str(error)]
    served = {need: fields for plan in plans for need, fields in plan.served.fields.items()}
    body["served"] = {need: list(fields) for need, fields in served.items()}
    body["notes"] += [note for plan in plans for note in plan.served.notes]
    body["terms"] = {name: terms[name] for name in terms_for(needs) if name in terms}
    if read.grids and any(map(row_aligned, plans)):
        body["reasons"].append(read.grids)
    for name, one in body["terms"].items():
        limit = max(request.budget.max_angle, 0.0 if math.isnan(one["floor_angle"]) else one["floor_angle"])
        if one["gradient_angle"] > limit:
            body["reasons"].append(
                f"{name}: gradient angle {one['gradient_angle']:.2g}° over --fidelity {request.budget.max_angle:g} "
                f"(noise floor {one['floor_angle']:.2g}°)"
            )
    if not body["reasons"] and plans:
        try:
            body["step"] = step_cost(cache, plans[-1], request.student, device)
        except KdcliError as error:
            body["reasons"].append(str(error))
    body["notes"] = list(dict.fromkeys(body["notes"]))
    return body


def unserved(cache: TeacherCache, method: str, needs: frozenset[Need], plans: Sequence[StagePlan]) -> list[str]:
    """Every need that no complete field serves, each with the command that adds one; none where the error was another."""
    if plans:
        return []
    parts = tuple(part for part in cache.parts() if captured(cache, part))
    available = {name: cache.fields[name]["params"] for name in (complete_fields(cache, parts) if parts else ())}
    found = []
    for need in sorted(needs):
        try:
            serve([need], available, method, str(cache.storage))
        except CompatibilityError as error:
            found.append(str(error))
    return found
