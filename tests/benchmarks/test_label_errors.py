from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import label_errors


def test_planted_answers_are_judged_by_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two tiny worlds; a second call reads what the first has captured, and says the same."""
    asked = ["--work", str(tmp_path), "--rows", "24", "--seeds", "0", "1", "--shares", "0.3"]
    bodies = []
    for _ in range(2):
        label_errors.main(asked)
        bodies.append(json.loads(capsys.readouterr().out.splitlines()[-1])["shares"]["0.3"])
    body = bodies[0]
    assert list(body["seeds"]) == ["0", "1"] and body["families"] == bodies[1]["families"]
    for one in body["seeds"].values():
        assert one["planted"] > 15 and one["suspected"] == round(one["estimated"])
        assert set(one["at the planted share"]) == set(label_errors.SCORES)
        assert one["at the planted share"]["margin - log n"] >= 0.8 and one["recall"] >= 0.6 and one["precision"] >= 0.8
        assert one["estimated, too sure"] > one["estimated"], "a teacher that is too sure expects fewer contradictions"
    counts = [sum(one[name] for one in body["families"].values()) for name in ("answers", "planted")]
    assert counts == [sum(one[name] for one in body["seeds"].values()) for name in ("answers", "planted")]


def test_a_score_that_knows_is_perfect_and_one_that_lies_is_not() -> None:
    def answer(number: int, margin: float, wrong: bool) -> label_errors.Labelled:
        one = label_errors.JudgedAnswer(1, number, 0, 1, margin, 0, int(margin > 0), 0.1, margin, 0)
        return label_errors.Labelled(one, "charts", wrong, 1, int(not wrong))

    answers = [answer(n, float(n), wrong=n >= 6) for n in range(8)]
    assert label_errors.ranked(answers, lambda one: one.margin) == 1
    assert label_errors.ranked(answers, lambda one: -one.margin) == 0
    errors = label_errors.teacher_errors(answers)["charts"]
    assert errors["answers"] == 6 and errors["contradicted"] == 5 / 6 and errors["right where sure"] == 1
