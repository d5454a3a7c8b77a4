"""The frontier of measured ways, and what a budget takes of it: before and after a preflight noted it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.judge.fidelity.frontier import Configuration
from pipelines.judge.plan.run import PlanRequest, estimate
from pipelines.judge.plan.teacher_cost import Speed
from pipelines.judge.preflight.budget import Budget
from pipelines.judge.preflight.choose import TokenCounts, choose, frontier
from pipelines.judge.preflight.ladder import Measured
from pipelines.judge.preflight.request import Notebook
from pipelines.judge.preflight.steps import pick, saved_steps, step_lines
from teacher_cache.errors import KdcliError

TOKENS = TokenCounts({"response": 20.0, "vision": 60.0}, other_bytes=80.0)
WHOLE = 0.5
"""Angles of whole gradients are half of the head's here."""


def ways(kind: str, *points: tuple[float, float, float]) -> list[Measured]:
    """(bytes a row, head's angle, KL) each."""
    return [
        Measured(
            Configuration(kind, f"{kind} {size:g}", {f"{kind}_hidden": {"step": angle}}),
            size,
            {f"{kind}_hidden": size},
            kl,
            {"forward": angle},
        )
        for size, angle, kl in points
    ]


@pytest.fixture
def measured() -> dict[str, list[Measured]]:
    return {
        "response": ways("response", (40, 4.0, 0.05), (60, 2.0, 0.01), (70, 2.5, 0.02), (100, 0.2, 0.001)),
        "vision": ways("vision", (10, 6.0, 0.05), (20, 1.0, 0.004), (40, 0.1, 0.001)),
    }


def confirm(one: Measured) -> None:
    one.angles = {"forward KL": WHOLE * one.head_angle}


def test_no_kind_is_finer_than_the_others_need(measured: Any) -> None:
    steps = frontier(measured, TOKENS, Budget(fidelity=1.0))
    pairs = [tuple(int(one.bytes_per_row) for one in step.ways.values()) for step in steps]
    assert pairs == [(40, 10), (40, 20), (60, 20), (100, 20), (100, 40)], "70 bytes are beaten by 60"
    assert [step.angle for step in steps] == [6.0, 4.0, 2.0, 1.0, 0.2]
    assert steps[0].bytes_per_sample == 80 + 20 * 40 + 60 * 10 and steps[0].bytes_per_token == 1480 / 80


@pytest.mark.parametrize(
    ("budget", "labels"),
    [
        (Budget(), ("response 100", "vision 20")),  # 0.005 nats
        (Budget(fidelity=1.0), ("response 60", "vision 20")),
        (Budget(fidelity=1.0, max_kl=0.002), ("response 100", "vision 40")),
        (Budget(fidelity=0.2), ("response 100", "vision 40")),
        (Budget(bytes_per_token=31), ("response 60", "vision 20")),
        (Budget(bytes_per_token=1000), ("response 100", "vision 40")),
    ],
)
def test_a_budget_takes_its_step(measured: Any, budget: Budget, labels: tuple[str, str]) -> None:
    """Whole gradients decide, and carry over to ways whose head's alone was measured."""
    chosen, steps, why = choose(measured, TOKENS, budget, confirm)
    assert chosen and tuple(one.label for one in chosen.ways.values()) == labels and not why
    assert chosen in steps and all(one.angles for one in chosen.ways.values())
    noted = [one.to_json() for one in steps]
    assert steps[pick(noted, budget)] == chosen
    lines = step_lines(noted, steps.index(chosen), 12e9, samples=1e6)
    assert lines[0].startswith("Chosen: 12") and f"{chosen.angle:.2g}° from the live gradient" in lines[0]
    assert len(lines) == 3 and all(line.startswith(("Next step", "Nothing ")) for line in lines[1:])


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (Budget(fidelity=0.01), "--fidelity 0.01: closest are 0.1°, 0.001 nats at 56.0 bytes a token"),
        (Budget(bytes_per_token=3), "--bytes-per-token 3: closest are 3°, 0.05 nats at 18.5 bytes a token"),
    ],
)
def test_a_budget_out_of_reach_names_the_nearest(measured: Any, budget: Budget, said: str) -> None:
    chosen, steps, why = choose(measured, TOKENS, budget, confirm)
    assert chosen and said in why and "\n" not in why
    with pytest.raises(KdcliError, match=r"cannot be met: the closest measured setting is .* bytes a token"):
        pick([one.to_json() for one in steps], budget)


def test_rows_without_a_student_are_judged_by_their_distributions(measured: Any) -> None:
    for one in measured["vision"]:
        one.head_angles = {}
    chosen, _, _ = choose(measured, TOKENS, Budget(fidelity=1.0), lambda one: confirm(one) if one.head_angles else None)
    assert chosen and chosen.ways["vision"].label == "vision 20", "within 0.005 nats"
    assert not math.isnan(chosen.angle)


def test_what_cannot_be_stored_says_why(measured: Any) -> None:
    for one in measured["response"]:
        one.error = "field response_hidden: too few"
    assert choose(measured, TOKENS, Budget()) == (None, [], "response rows: field response_hidden: too few")


def test_a_noted_frontier_is_read_again(measured: Any, tmp_path: Path) -> None:
    _, steps, _ = choose(measured, TOKENS, Budget(), confirm)
    folder = tmp_path / "preflight"
    with pytest.raises(KdcliError, match=r"there is no preflight of .*: run `kdcli preflight` first"):
        saved_steps(str(folder / "cache"), 48)
    notebook = Notebook(str(folder), {"teacher": {"hidden_size": 48}})
    notebook.note("frontier", [one.to_json() for one in steps])
    assert saved_steps(str(folder / "cache"), 48) == [one.to_json() for one in steps]
    with pytest.raises(KdcliError, match="is of a teacher 48 wide, this one is 576"):
        saved_steps(str(folder / "cache"), 576)


def test_plan_takes_a_step_of_what_was_measured(flown: Any, ask: Any, tmp_path: Path) -> None:
    request, result = ask(tmp_path), flown[1]
    settings = replace(request.settings.capture, calibration=result["cache"])

    def planned(**budget: float) -> Any:
        speed = Speed(tokens_per_second=1.0)
        asked = (request.teacher, request.data, settings, {}, {}, 12, None, speed, Budget(**budget))
        return estimate(PlanRequest(*asked))

    chosen, finest = planned(fidelity=1.0), planned(bytes_per_token=1e6)
    assert chosen.chosen[0].startswith("Chosen: ") and chosen.chosen[1].startswith("Next step up: ")
    assert finest.bytes > chosen.bytes and finest.chosen[1] == "Nothing finer was measured."
    measured = {one.name for one in chosen.columns if one.basis == "measured"}
    assert measured == {f"fields/{kind}_{what}" for kind in ("response", "vision") for what in ("topk", "hidden")}
    assert chosen.assumes["preflight"] == {}, "nothing is left to choose"
    with pytest.raises(KdcliError, match=r"--bytes-per-token 1 cannot be met: the closest measured setting is"):
        planned(bytes_per_token=1)
