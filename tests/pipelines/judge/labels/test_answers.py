"""One answer against the teacher, and the estimate over many: against the same written out plainly, and against worlds made by chance."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from pipelines.judge.labels.answers import JudgedAnswer, answers_of
from pipelines.judge.labels.tally import LabelTally
from student_train.distributions import DenseTeacher, HeadAndTail, OfLabels, of_labels
from teacher_cache.records import TextTokens
from teacher_cache.signal_records import TopK

END, BLANK = 90, 91


def text_of(answers: dict[int, list[int]]) -> TextTokens:
    """turn → label ids, each behind a question of two tokens."""
    ids, turns, response = [], [], []
    for turn, labels in answers.items():
        ids += [1, 2, *labels]
        turns += [turn - 1] * 2 + [turn] * len(labels)
        response += [False] * 2 + [True] * len(labels)
    columns = (torch.tensor(ids, dtype=torch.uint32), torch.tensor([2 * flag for flag in response], dtype=torch.uint8))
    return TextTokens(*columns, torch.tensor(turns, dtype=torch.uint16), torch.tensor(response, dtype=torch.bool), ())


def said(labels: list[int], likeliest: list[int], p: list[float], own: list[float]) -> OfLabels:
    logs = [torch.tensor(one).log() for one in (p, own)]
    return OfLabels(torch.tensor(likeliest), logs[0], logs[1], torch.ones(len(labels), dtype=torch.bool))


def test_turns_margins_and_ends() -> None:
    """The surest contradicted token is named; the end token and white space behind an answer do not count, nor an answer of them alone."""
    text = text_of({1: [10, END], 3: [11, 12, 13, BLANK, END], 6: [END]})
    labels = text.response_ids.tolist()
    likeliest = [10, 7, 11, 20, 21, 7, 7, 7]
    p = [0.9, 0.99, 0.8, 0.5, 0.9, 0.9, 0.9, 0.9]
    own = [0.9, 0.001, 0.8, 0.25, 0.01, 0.01, 0.01, 0.01]
    right, wrong, empty = answers_of(text, said(labels, likeliest, p, own), {END, BLANK})
    assert (right.turn, right.number, right.tokens, right.contradicted, right.score) == (1, 0, 1, 0, -math.inf)
    assert right.doubt == pytest.approx(0.1) and right.nll == pytest.approx(-math.log(0.9))
    assert (wrong.turn, wrong.number, wrong.first, wrong.tokens, wrong.contradicted) == (3, 1, 2, 3, 2)
    assert wrong.at == 4 and wrong.margin == pytest.approx(math.log(90))
    assert wrong.score == pytest.approx(math.log(90) - math.log(3))
    assert wrong.doubt == pytest.approx(0.2 + 0.5), "until the first contradicted token, with it"
    assert wrong.nll == pytest.approx(-math.log(0.8 * 0.25 * 0.01))
    assert (empty.turn, empty.number, empty.tokens, empty.contradicted) == (6, 2, 0, 0)
    tally = LabelTally()
    for one in (right, wrong, empty):
        tally.add(one)
    assert (tally.answers, tally.empty, tally.contradicted, tally.tokens) == (2, 1, 1, 4)


def test_a_row_without_an_answer_has_none() -> None:
    text = text_of({})
    none = said([], [], [], [])
    assert list(answers_of(text, none, ())) == []
    assert not LabelTally().estimable and LabelTally().to_json()["wrong"] is None


def test_what_the_head_says_of_labels_is_what_the_whole_vocabulary_says() -> None:
    """Of labels outside of the head a bound; of all others the log-prob itself."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 8, generator=generator), torch.randn(30, 8, generator=generator)
    labels = torch.randint(0, 30, (40,), generator=generator)
    log_probs = (hidden @ weight.T).log_softmax(1)
    values, ids = log_probs.topk(4, dim=1)
    rest = log_probs.scatter(1, ids, -torch.inf).logsumexp(1)
    whole = of_labels(DenseTeacher(hidden, weight), labels)
    head = of_labels(HeadAndTail(TopK(ids, values, rest, torch.zeros(40)), 30), labels)
    assert whole.known.all() and 5 < int(head.known.sum()) < 35
    assert torch.allclose(whole.log_probs, log_probs[torch.arange(40), labels], atol=1e-5)
    assert torch.equal(whole.likeliest, head.likeliest)
    assert torch.allclose(whole.log_likeliest, head.log_likeliest, atol=1e-5)
    assert torch.allclose(whole.log_probs[head.known], head.log_probs[head.known], atol=1e-5)
    assert (head.log_probs >= whole.log_probs - 1e-5).all() and not torch.allclose(head.log_probs, whole.log_probs)


def by_chance(share: float, count: int, seed: int, lengths: tuple[int, int]) -> LabelTally:
    """Answers of a teacher whose probabilities hold; a wrong one differs from a right one at one token at least."""
    rng, tally = random.Random(seed), LabelTally()
    for _ in range(count):
        sure = [rng.uniform(0.6, 1.0) for _ in range(rng.randint(*lengths))]
        other = [rng.random() > p for p in sure]
        if rng.random() < share:
            other[rng.randrange(len(sure))] = True
        until = other.index(True) + 1 if any(other) else len(sure)
        doubt = sum(1 - p for p in sure[:until])
        tally.add(JudgedAnswer(1, 0, 0, len(sure), 0.0, 0, sum(other), doubt, 1.0, 0))
    return tally


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.4])
def test_the_estimate_is_the_planted_share(share: float) -> None:
    """Within three standard errors, which are those of the counts."""
    tally = by_chance(share, 4000, 1, (1, 3))
    assert abs(tally.wrong - share * 4000) < 3 * tally.error
    assert 0 < tally.error < 120


def test_of_long_answers_nothing_is_told() -> None:
    tally = by_chance(0.2, 500, 2, (10, 20))
    assert tally.contradicted > 400 and not tally.estimable and math.isnan(tally.wrong)
    body: dict[str, Any] = tally.to_json()
    assert body["wrong"] is None and body["wrong_error"] is None and body["expected"] > 0.5
