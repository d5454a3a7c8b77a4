"""``kdcli fidelity``: what a cache says, term by term, against the live teacher that made it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from pipelines.judge.fidelity.compare import LIVE, compare, match_all
from pipelines.judge.fidelity.frontier import Frontier, wants_of_ways
from pipelines.judge.fidelity.measure import DIRECTIONS
from pipelines.judge.fidelity.opened import FidelityRequest, OpenedSides, comparable, open_cache, open_student
from pipelines.judge.fidelity.rows import FidelityReader, FidelitySample, capture_preparer, draw
from pipelines.judge.fidelity.sources import HIDDEN, OutputSource, cache_source, check_head, listen, live_source
from pipelines.judge.fidelity.stored import bytes_of, cache_bytes, combinations, measure_rows
from pipelines.judge.fidelity.student import Student
from pipelines.judge.fidelity.sweep import configurations
from pipelines.judge.fidelity.terms import MATCHING, MATCHING_NEEDS, TERMS
from student_train.needs import Need, Served
from student_train.stages import parse_stages
from teacher_cache.errors import KdcliError
from teacher_cache.records import TeacherOutput
from teacher_cache.teachers.backends import linear_head
from teacher_cache.teachers.transformers import TransformersTeacher, resolve_dtype

CACHE, SINGLE = "cache", "one by one"
CALIBRATION_SAMPLES = 256
Progress = Callable[[str, int, int], None]


@dataclass
class LiveRuns:
    """What the live teacher said, run by run. outputs: run → per sample. heads: run → W ``[V, D]``. calibration: for a sweep."""

    outputs: dict[str, list[TeacherOutput]] = field(default_factory=dict)
    heads: dict[str, torch.Tensor] = field(default_factory=dict)
    calibration: list[TeacherOutput] = field(default_factory=list)


def fidelity(request: FidelityRequest, progress: Progress = lambda event, done, total: None) -> dict[str, Any]:
    """Compare. ``progress(event, done, total)`` is called as it goes on.

    Returns:
        One JSON-able object: what was compared, ``terms``, ``matching``, ``unserved``, ``distributions``, ``bytes``, ``sweep``.
    """
    stages = parse_stages(request.stage)
    if len(stages) != 1:
        raise KdcliError(f"--stage {request.stage}: gradients are compared for one stage at a time")
    (stage,) = stages
    opened = open_cache(request)
    preparer = capture_preparer(opened.cache, opened.processor, opened.config)
    reader = FidelityReader(opened.cache, opened.parts, opened.fields, preparer)
    places = draw(reader.cached.counts, request.samples + CALIBRATION_SAMPLES * request.sweep, request.seed)
    progress("reading", 0, 1)
    rows = reader.read(places[: request.samples])
    others = reader.read(places[request.samples :])
    if not rows or (request.sweep and not others):
        raise KdcliError(
            f"{opened.cache.storage}: {len(rows)} rows in part {', '.join(opened.parts)}: too few for --samples "
            f"{request.samples}" + (", since --sweep calibrates on others" if request.sweep else "")
        )
    student = open_student(request, opened, reader, rows, stage.trains)
    progress("asking the teacher", 0, 1)
    runs = ask_teacher(request, opened, rows, others)
    return {
        **describe_run(request, opened, rows, student, stage.name),
        **compare_cache(opened, rows, student, runs, progress),
        "sweep": sweep(runs, rows, student, progress) if request.sweep else [],
        "notes": opened.notes,
    }


def ask_teacher(
    request: FidelityRequest, opened: OpenedSides, rows: Sequence[FidelitySample], others: Sequence[FidelitySample]
) -> LiveRuns:
    """The live teacher on the compared rows three times: as it is, one sample at a time, and in another dtype."""
    own = resolve_dtype(opened.spec, opened.config)
    other = "float32" if own == torch.bfloat16 else "bfloat16"
    prepared = [row.teacher for row in rows]
    wants = HIDDEN | wants_of_ways(configurations() if request.sweep else [])
    runs = LiveRuns()
    teacher = TransformersTeacher(opened.spec, opened.processor, opened.config)
    check_head(opened.cache, opened.fields, linear_head(teacher))
    runs.outputs[LIVE] = listen(teacher, prepared, wants, request.batch_tokens)
    runs.outputs[SINGLE] = listen(teacher, prepared, HIDDEN, 1)
    runs.calibration = listen(teacher, [row.teacher for row in others], wants, request.batch_tokens) if others else []
    runs.heads = dict.fromkeys((LIVE, SINGLE), teacher.head.cpu())
    del teacher  # two of a large one do not fit
    teacher = TransformersTeacher(replace(opened.spec, dtype=other), opened.processor, opened.config)
    runs.outputs[other] = listen(teacher, prepared, HIDDEN, request.batch_tokens)
    runs.heads[other] = teacher.head.cpu()
    return runs


def sweep(runs: LiveRuns, rows: Sequence[FidelitySample], student: Student, progress: Progress) -> list[dict[str, Any]]:
    """Many ways to store distributions, fitted on the calibration rows and measured on the compared ones; see ``Frontier.measure``."""
    prepared = [row.teacher for row in rows]
    frontier = Frontier(student, prepared, runs.outputs[LIVE], runs.calibration, runs.heads[LIVE])
    report = partial(progress, "sweep")
    return frontier.measure(configurations(), tuple(DIRECTIONS), report)


def compare_cache(
    opened: OpenedSides, rows: Sequence[FidelitySample], student: Student, runs: LiveRuns, progress: Progress
) -> dict[str, Any]:
    """Terms, matching, distributions and bytes of the cache, with the live runs beside them."""
    cache, device = opened.cache, student.device
    terms, unserved = comparable(opened, student)
    pairs = combinations(cache, opened.fields)
    needs = {**{name: term.needs for name, term in TERMS.items()}, MATCHING: MATCHING_NEEDS}
    needs |= {kind: frozenset({Need(f"{kind}_logits")}) for kind, _ in pairs.values()}
    live = {name: live_source(runs.outputs[name], runs.heads[name], needs, device) for name in runs.outputs}
    served = {**opened.served, **{n: Served({f"{k}_logits": f}, ()) for n, (k, f) in pairs.items()}}
    stored = cache_source(cache, served, [row.records for row in rows], device)
    sources: dict[str, OutputSource] = {LIVE: live.pop(LIVE), CACHE: stored, **live}
    chosen = {name: TERMS[name] for name in terms}
    matches: dict[str, list[torch.Tensor]] = {}
    matching: dict[str, Any] = {}
    if MATCHING in stored.signals or any(term.matching for term in chosen.values()):
        matches, matching = match_all(student, {n: one for n, one in sources.items() if MATCHING in one.signals})
    found = compare(chosen, student, sources, matches, lambda more, total: progress("comparing", more, total))
    sizes = cache_bytes(cache, opened.parts, opened.fields)
    measured: dict[str, Any] = {}
    for kind in dict.fromkeys(kind for kind, _ in pairs.values()):
        ours = {name: stored for name, (own, _) in pairs.items() if own == kind}
        measured |= measure_rows(kind, sources[LIVE], ours, student)
    distributions = {
        name: {"fields": list(fields), "kind": kind, **bytes_of(sizes, fields), **measured[name]}
        for name, (kind, fields) in pairs.items()
    }
    return {
        "terms": {name: {"fields": opened.served[name].names, **one} for name, one in found.items()},
        "matching": matching if CACHE in matching else {},
        "unserved": unserved,
        "distributions": distributions,
        "bytes": sizes,
    }


def describe_run(
    request: FidelityRequest, opened: OpenedSides, rows: Sequence[FidelitySample], student: Student, stage: str
) -> dict[str, Any]:
    return {
        "cache": str(opened.cache.storage),
        "plan_hash": opened.cache.plan_hash,
        "parts": list(opened.parts),
        "teacher": opened.spec.id,
        "dtype": opened.spec.dtype,
        "device": str(student.device),
        "student": request.student,
        "stage": stage,
        "samples": len(rows),
        "rows": {kind: sum(len(one[kind]) for one in student.rows) for kind in ("response", "vision")},
        "seed": request.seed,
        "trained_parameters": sum(one.numel() for one in student.parameters),
    }
