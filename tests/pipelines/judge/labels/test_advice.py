"""What is said of a part: by how many answers are wrong, of how many, and whether that can be told."""

from __future__ import annotations

import pytest

from pipelines.judge.labels.advice import CLEAN, LEAST_ANSWERS, NOISY, SELECT, advise, percent
from pipelines.judge.labels.survey import PartSurvey, Survey
from pipelines.judge.labels.tally import LabelTally


def part(answers: int, contradicted: int, doubt: float = 0.0, **sources: LabelTally) -> PartSurvey:
    one = LabelTally(answers=answers, contradicted=contradicted, tokens=answers, doubt=doubt)
    return PartSurvey("sft", (1, 1), rows=answers, sources={"shapes": one, **sources})


def sentence(one: PartSurvey) -> str:
    (said,) = advise(Survey("c", ("response_topk",), [], [one]))
    return said


@pytest.mark.parametrize(
    ("one", "says"),
    [
        (part(1000, 300, doubt=100.0), "about 22 % (± 1.9 %) are wrong. Distil with reg = 0 there (--set reg=0)"),
        (part(1000, 150, doubt=100.0), "about 5.6 % (± 1.4 %) are wrong. Look at the first ones, or train with"),
        (part(1000, 110, doubt=100.0), "labels and teacher agree, so expect little from distilling responses alone"),
        (part(1000, 60, doubt=100.0), "labels and teacher agree"),
        (part(1000, 900, doubt=600.0), "there is no estimate of wrong ones"),
        (part(LEAST_ANSWERS - 1, 20), "29 answers were checked, too few"),
        (part(40, 10, doubt=1.0), "about 23 % (± 8.1 %) are wrong. Distil"),
    ],
)  # fmt: skip
def test_the_sentence_follows_the_share(one: PartSurvey, says: str) -> None:
    assert says in sentence(one), sentence(one)


def test_bounds_and_noise() -> None:
    """A large share within two standard errors of none is not advised on; the worst sources are named, those without estimate not."""
    assert CLEAN < NOISY and SELECT in sentence(part(1000, 300))
    shaky = part(31, 4, doubt=0.4)
    assert shaky.wrong / shaky.wrong_of > NOISY and shaky.wrong < 2 * shaky.error
    assert "Look at the first ones" in sentence(shaky)
    text = LabelTally(answers=100, contradicted=80, doubt=70.0)
    chart = LabelTally(answers=100, contradicted=50, doubt=10.0)
    said = sentence(part(800, 80, doubt=80.0, text=text, chart=chart))
    assert "(chart 44 %, shapes 0 %)" in said and "text" not in said and "about 4.9 %" in said


def test_a_part_that_was_not_read_has_no_sentence() -> None:
    assert advise(Survey("c", ("response_topk",), [], [PartSurvey("caption", (0, 3))])) == []
    assert "0 answers were checked, too few" in sentence(
        PartSurvey("sft", (1, 1), rows=3, sources={"": LabelTally(empty=3)})
    )


def test_shares_are_told_as_exactly_as_they_are_known() -> None:
    assert [percent(one) for one in (0.0, 0.004, 0.05, 0.0994, 0.0996, 0.5, 1.0)] == [
        "0 %", "0.4 %", "5.0 %", "9.9 %", "10 %", "50 %", "100 %",
    ]  # fmt: skip
