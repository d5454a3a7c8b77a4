"""The demo's sentence says what the figures say; the spread beside it is what the benchmark saved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.common import RESULTS
from pipelines.demo.gain import KNOWN, Gain, compared, cost, gain_of, lead, sentence, spread
from pipelines.demo.questions import IMAGE_FAMILIES
from pipelines.demo.run import DEMO, DemoRecipe
from pipelines.demo.students import Trained
from pipelines.report.runs import read_runs
from tests.pipelines.report.conftest import make_run  # noqa: F401

GAIN = Gain(wrong=400, answers=1000, questions=480, percent=(22.0, 33.5), nats=(1.0, 0.9), text=(34.0, 48.0))


@pytest.mark.parametrize(
    ("percent", "nats", "follows"),
    [
        ((22.0, 33.5), (1.0, 0.9), "(+11.5 points, −0.100 nats a token): distilling pays here."),
        ((33.5, 22.0), (0.9, 1.0), "(−11.5 points, +0.100 nats a token): distilling does not pay here."),
        (
            (30.0, 32.0),
            (0.9, 0.8),
            "(+2.0 points, −0.100 nats a token): no gain is shown, for so many questions tell no",
        ),
        (
            (30.0, 29.0),
            (0.9, 0.8),
            "(−1.0 points, −0.100 nats a token): no gain is shown, for so many questions tell no",
        ),
        ((22.0, 33.5), (0.9, 1.0), "(+11.5 points, +0.100 nats a token): no gain is shown"),
        ((22.0, 33.5), (None, 1.0), "(+11.5 points): distilling pays here."),
    ],
)
def test_the_sentence_follows_from_the_figures(percent, nats, follows) -> None:
    told = sentence(replace(GAIN, percent=percent, nats=nats))
    assert told.startswith("With 40 % of the training answers wrong, ") and follows in told
    assert f"{percent[1]:.1f} % of 480 held-out questions about an image, tuned sft {percent[0]:.1f} %" in told


def test_clean_answers_are_said_to_be_clean() -> None:
    clean = replace(GAIN, wrong=0)
    assert sentence(clean).startswith("With every training answer right, ")
    assert "wrong" not in compared(clean, (20, 200), 16, (5e-4, 1e-3))


def test_doubt_is_two_standard_errors_of_the_difference() -> None:
    assert replace(GAIN, percent=(50.0, 50.0), questions=800).doubt == pytest.approx(5.0)
    assert replace(GAIN, percent=(50.0, 50.0), questions=3200).doubt == pytest.approx(2.5)


def test_figures_are_those_of_the_rows_by_name() -> None:
    def scores(mean: float, nll: float, text: float) -> dict:
        image = {name: {"exact_match": mean, "nll": nll, "n": 80} for name in IMAGE_FAMILIES}
        return {"families": {**image, "text": {"exact_match": text, "nll": 5.0, "n": 80}}}

    trained = [Trained("kd", 0, Path(), scores(0.335, 0.9, 0.48)), Trained("sft", 0, Path(), scores(0.22, 1.0, 0.34))]
    gain = gain_of(trained, 400, 1000)
    assert (gain.percent, gain.nats, gain.text) == (pytest.approx(GAIN.percent), pytest.approx(GAIN.nats), GAIN.text)
    assert replace(gain, percent=GAIN.percent, nats=GAIN.nats) == GAIN
    assert "kd 48 %, sft 34 %" in compared(gain, (20, 200), 16, (5e-4, 1e-3))
    told = lead(GAIN, {"Cost": "little"})
    assert [number for number, _ in told.figures] == ["+11.5 points", "−0.100 nats"]
    assert told.facts == [("Cost", "little")] and told.sentence == sentence(GAIN)


def test_the_cost_is_that_of_all_steps(make_run) -> None:  # noqa: F811
    runs = dict(zip(("sft", "kd"), read_runs([make_run("sft", steps=10), make_run("kd", steps=20)])))
    assert cost(runs, 61.2, 18_200_000) == (
        "training sft 5 s, kd 10 s, side by side; the cache took 61 s, once for all students, 18.2 MB"
    )
    assert "the cache was there before, 18.2 MB" in cost(runs, None, 18_200_000)


def test_the_known_spread_is_the_saved_one() -> None:
    saved = json.loads((RESULTS / "demo_gain.json").read_text())
    assert DemoRecipe(**saved["recipe"]) == DEMO
    assert (list(KNOWN.points), list(KNOWN.nats), list(KNOWN.seeds)) == (saved["points"], saved["nats"], saved["seeds"])
    told = spread(KNOWN)
    assert KNOWN.command in told and "seeds 0–4" in told
    sft, kd = saved["students"]["sft"], saved["students"]["kd"]
    for a, b, points, nats in zip(sft, kd, saved["points"], saved["nats"], strict=True):
        assert b["percent"] - a["percent"] == pytest.approx(points, abs=0.011)
        assert b["nats"] - a["nats"] == pytest.approx(nats, abs=0.0001)


def test_the_demo_shows_what_it_claims_on_every_seed() -> None:
    assert min(KNOWN.points) >= 8 and max(KNOWN.nats) <= -0.08
