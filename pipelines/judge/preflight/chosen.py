"""How finely each row kind is stored: measured, chosen by the budget, noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipelines.judge.fidelity.frontier import Frontier, wants_of_ways
from pipelines.judge.fidelity.rows import FidelitySample
from pipelines.judge.fidelity.student import Student
from pipelines.judge.preflight.choose import TokenCounts, choose
from pipelines.judge.preflight.judge import LiveAnswers, needs_of
from pipelines.judge.preflight.ladder import Bench, Measured, candidates, terms_for
from pipelines.judge.preflight.request import Notebook, PreflightRequest, has_ladder, names_of
from student_train.needs import Need
from teacher_cache.fields.calibration import Calibration
from teacher_cache.wants import Wants

KINDS = ("response", "vision")
Progress = Callable[[str, int, int], None]


def all_needs(request: PreflightRequest) -> frozenset[Need]:
    return frozenset().union(*(needs_of(request, method) for method in request.methods))


def ladder_wants(request: PreflightRequest) -> Wants:
    """What the teacher must compute for every candidate."""
    base = request.base_fields()
    return wants_of_ways([one for kind in KINDS if has_ladder(base, kind) for one in candidates(kind, base)])


@dataclass(frozen=True)
class Chosen:
    """What was chosen.

    Attributes:
        choices: of each row kind, with its ladder. frontier: steps of ``choose.Step.to_json``. why: it is not within the budget, or "".
        params: field → parameters over the profile's. fitted: calibrations of fields that were fitted on the way.
    """

    choices: list[dict[str, Any]]
    frontier: list[dict[str, Any]]
    why: str
    params: dict[str, dict[str, Any]]
    fitted: dict[str, Calibration]


def chosen_params(
    request: PreflightRequest,
    notebook: Notebook,
    student: Student,
    rows: list[FidelitySample],
    answers: LiveAnswers,
    progress: Progress,
) -> Chosen:
    """Noted, so that a re-run captures the same."""
    noted = notebook.found
    fitted: dict[str, Calibration] = {}
    if "choices" not in noted:
        teacher_rows = [row.teacher for row in rows]
        frontier = Frontier(student, teacher_rows, answers.outputs, answers.fitting, answers.head)
        bench = Bench(frontier, terms_for(all_needs(request)))
        choices, steps, why = measure_and_choose(request, bench, progress)
        notebook.note("frontier", steps)
        notebook.note("why", why)
        notebook.note("choices", choices)  # the last: what a re-run looks for
        fitted = calibrations(frontier, request.base_fields() | params_of(choices))
    params = request.kept_params() | params_of(noted["choices"])
    return Chosen(noted["choices"], noted.get("frontier", []), noted.get("why", ""), params, fitted)


def params_of(choices: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: params for choice in choices for name, params in choice["fields"].items()}


def calibrations(frontier: Frontier, fields: dict[str, dict[str, Any]]) -> dict[str, Calibration]:
    """Of all fields that were fitted, or can be, on what the teacher has said already."""
    found = {}
    for name, params in fields.items():
        if frontier.serves(name, params) and (one := frontier.fit(name, params).calibration):
            found[name] = one
    return found


def measure_and_choose(
    request: PreflightRequest, bench: Bench, progress: Progress
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """(choices of every row kind, steps of the frontier, why the chosen one is not what was asked for)."""
    base, frontier = request.base_fields(), bench.frontier
    kinds = [kind for kind in KINDS if has_ladder(base, kind)]
    measured: dict[str, list[Measured]] = {}
    for kind in kinds:
        report = partial(progress, f"measuring ways to store {kind} rows")
        measured[kind] = bench.measure(candidates(kind, base), report)
    there = {kind: ways for kind, ways in measured.items() if ways}
    if not there:
        return [], [], "no held-out row has a token to choose the storage on" if kinds else ""
    others = [name for name in base if name not in {n for kind in kinds for n in names_of(kind)}]
    samples = max(1, len(frontier.outputs))
    spent = sum(frontier.size(name, base[name]) for name in others if frontier.serves(name, base[name]))
    tokens = TokenCounts({kind: frontier.rows(kind) / samples for kind in KINDS}, spent / samples)
    chosen, steps, why = choose(there, tokens, request.budget, bench.confirm)
    found = []
    for kind, ways in there.items():
        way = chosen.ways[kind] if chosen else ways[0]
        ladder = [one.to_json() for one in ways]
        found.append(way.candidate.to_json() | {"ladder": ladder, "reasons": [why] if why else []})
    return found, [one.to_json() for one in steps], why
