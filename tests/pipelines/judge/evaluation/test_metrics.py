"""Metrics against worked examples of their sources and against the edges of their rules."""

from __future__ import annotations

import itertools

import pytest

from pipelines.judge.evaluation.metrics import measure, metric_module, metric_modules
from pipelines.judge.evaluation.metrics.anls import edit_distance
from pipelines.judge.evaluation.metrics.mcq import letter
from pipelines.judge.evaluation.metrics.vqa_accuracy import normalise
from teacher_cache.errors import KdcliError


def score(name: str, given: str, *references: str) -> float | None:
    return metric_module(name).score(given, references)


def test_the_folder_is_the_registry() -> None:
    assert sorted(metric_modules()) == [
        "anls", "contains", "exact_match", "mcq", "pope", "relaxed_accuracy", "vqa_accuracy",
    ]  # fmt: skip
    with pytest.raises(KdcliError, match="unknown metric 'bleu': choose from anls, contains, exact_match"):
        metric_module("bleu")


def test_exact_match_takes_any_reference() -> None:
    assert score("exact_match", " Two. ", "2", "two") == 1 and score("exact_match", "two cats", "2", "two") == 0


@pytest.mark.parametrize(("people", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_people(people: int, accuracy: float) -> None:
    """The well-known steps of the averaged formula: every nine of ten, min(agreeing / 3, 1)."""
    answers = ["yes"] * people + ["no"] * (10 - people)
    assert score("vqa_accuracy", "Yes", *answers) == pytest.approx(accuracy)
    # By the words of the definition, one choice of nine after another.
    nines = [[answers[i] for i in kept] for kept in itertools.combinations(range(10), 9)]
    assert accuracy == pytest.approx(sum(min(nine.count("yes") / 3, 1) for nine in nines) / 10)


@pytest.mark.parametrize(
    ("answers", "accuracy"),
    [
        (["cat"], 1.0),
        (["dog"], 0.0),
        (["cat", "dog"], 0.5),
        (["cat", "cat"], 1.0),
        (["cat", "cat", "dog"], 2 / 3),
        (["cat", "dog", "dog", "dog"], 0.25),
    ],
)
def test_vqa_accuracy_of_fewer_people(answers: list[str], accuracy: float) -> None:
    """What everyone says is right, however few they are; from four on the formula is as published."""
    assert score("vqa_accuracy", "a cat", *answers) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat.", "cat"),
        ("two", "2"),
        ("none", "0"),
        ("ten cats", "10 cats"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("im here", "im here"),  # the public table is in another case: it never applies
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("1,000", "1000"),
        ("$1,000-2,000", "$10002000"),  # a comma inside a number glues every mark
        ("3.5 m.", "3.5 m"),
        ("left-hand side", "left hand side"),
        ("wait - what?", "wait what"),
        ("a  \n the\tdog", "dog"),
        ("what's", "what's"),
        ("", ""),
    ],
)
def test_vqa_normalisation(text: str, normal: str) -> None:
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("given", "reference", "right"),
    [
        ("105", "100", 1), ("106", "100", 0), ("95", "100", 1), ("94.9", "100", 0),
        ("-104", "-100", 1), ("104", "-100", 0), ("12.", "12", 1), ("1e2", "100", 1),
        ("10%", "10%", 1), ("0.1", "10%", 1), ("10", "10%", 0), ("10%", "10", 0),
        ("0", "0", 1), ("0.0", "0", 0), ("0.001", "0", 0),
        (" Blue ", "blue", 1), ("blue.", "blue", 0), ("1,000", "1000", 0), ("1,000", "1,000", 1),
        ("2010 people", "2010", 0), ("", "5", 0),
    ],
)  # fmt: skip
def test_relaxed_accuracy(given: str, reference: str, right: int) -> None:
    assert score("relaxed_accuracy", given, reference) == right


def test_relaxed_accuracy_takes_the_best_reference() -> None:
    assert score("relaxed_accuracy", "103", "50", "100") == 1


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("saturday", "sunday", 3), ("", "abc", 3), ("abc", "abc", 0), ("flaw", "lawn", 2)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("given", "references", "similarity"),
    [
        ("sitting", ["kitten"], 1 - 3 / 7),
        ("Sitting  ", ["unrelated", "sitting"], 1.0),
        ("ab", ["abcd"], 0.5),  # exactly at the threshold
        ("ab", ["abcde"], 0.0),
        ("john\nsmith", ["John Smith"], 1.0),
        ("", ["x"], 0.0),
    ],
)
def test_anls(given: str, references: list[str], similarity: float) -> None:
    assert score("anls", given, *references) == pytest.approx(similarity)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("B", "B"), ("b", "B"), ("B.", "B"), ("(B)", "B"), ("B)", "B"), (" B: ", "B"), ("B. a circle", "B"),
        ("(b)", "B"), ("(C) the third", "C"), ("The answer is D.", "D"), ("The correct answer is (A)", "A"),
        ("Answer: C", "C"), ("answer: C", "C"), ("A circle", None), ("I think so", None), ("", None), ("BC", None),
        ("the answer is Dog", None),
    ],
)  # fmt: skip
def test_letters(text: str, named: str | None) -> None:
    assert letter(text) == named


def test_mcq_counts_questions_with_a_letter_only() -> None:
    assert score("mcq", "b. blue", "B") == 0 and score("mcq", "B. blue", "B") == 1 and score("mcq", "blue", "B") == 0
    assert score("mcq", "B", "a red one") is None
    answers = [("B", ["B"]), ("A", ["B"]), ("x", ["twelve"])]
    assert measure("mcq", answers) == {"mcq": 0.5} and measure("mcq", answers[2:]) == {}


def test_contains() -> None:
    assert score("contains", "It says\nEXIT here", "says exit") == 1 and score("contains", "ex it", "exit") == 0
    assert score("contains", "anything", "") == 0


def test_pope_by_its_confusion_matrix() -> None:
    """3 hits, 1 miss, 2 false alarms, 4 right denials: as the public script reads answers."""
    yes, no = ["Yes"], ["no"]
    answers = [("Yes, there is.", yes), ("yes", yes), ("A dog. No cat.", yes), ("No, it is not", yes)]
    answers += [("Yes", no), ("It seems so", no), ("no", no), ("There is not, sadly.", no), ("NO.", no), ("no dog", no)]
    found = measure("pope", [*answers, ("blue", ["blue"])])
    assert found == pytest.approx(
        {"pope_accuracy": 0.7, "pope_precision": 3 / 5, "pope_recall": 3 / 4, "pope_f1": 2 / 3, "pope_yes_ratio": 0.5}
    )


def test_pope_without_positives_or_without_questions() -> None:
    found = measure("pope", [("no", ["no"])])
    assert (found["pope_accuracy"], found["pope_precision"], found["pope_f1"]) == (1.0, 0.0, 0.0)
    assert measure("pope", [("blue", ["blue"])]) == {}
