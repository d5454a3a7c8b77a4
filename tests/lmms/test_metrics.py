"""Our metrics against lmms-eval's own, answer by answer."""

from __future__ import annotations

import itertools

import pytest

from pipelines.judge.evaluation.metrics import anls, relaxed_accuracy, vqa_accuracy

TEXTS = ["The Cat.", "two", "none", "dont", "couldn'tve", "red/blue", "red / blue", "1,000", "3.5 m.", "left-hand side"]
TEXTS += ["wait - what?", "a  \n the\tdog", "its", "shes", "ten 10", "U.S.A.", "no!", "[x]", "somebody'd", ""]


def test_vqa_normalisation() -> None:
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    theirs = EvalAIAnswerProcessor()
    # The table of contractions, as far as lower-cased words can meet it; lmms-eval also parts "'s" from its word, the public code does not.
    words = [key for key in theirs.CONTRACTIONS if key == key.lower() and "'s" not in key]
    wrong = {text: (vqa_accuracy.normalise(text), theirs(text)) for text in [*TEXTS, *words]}
    assert {text: pair for text, pair in wrong.items() if pair[0] != pair[1]} == {}


NUMBERS = ["0", "10", "10%", "0.1", "9.6", "9.4", "-10", "ten", "1,000", "100", "104.9", "12."]


@pytest.mark.parametrize(("given", "reference"), itertools.product(NUMBERS, NUMBERS))
def test_relaxed_accuracy(given: str, reference: str) -> None:
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    assert relaxed_accuracy.score(given, [reference]) == float(relaxed_correctness(given, reference))


@pytest.mark.parametrize("given", ["sitting", "ab", "John\n Smith", "x", "kitten", ""])
def test_anls(given: str) -> None:
    from lmms_eval.api.metrics import anls as theirs

    references = ["kitten", "abcd", "John Smith"]
    assert anls.score(given, references) == pytest.approx(theirs(references, [given])["anls"])
