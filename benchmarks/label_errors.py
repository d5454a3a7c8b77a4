"""How many planted wrong answers does `kdcli doctor --cache` find, how many of what it finds are planted, and is its estimate right?

    OMP_NUM_THREADS=1 python -m benchmarks.label_errors --save [--work FOLDER] [--rows 1000] [--seeds 0 1 2] [--shares 0.05 0.2 0.4]

Demo worlds (no captions) with a share of their training answers made wrong, captured by the demo teacher with the eight likeliest tokens;
--work keeps them, and goes on with what is there. Precision is taken twice: of as many answers as were planted, which no user knows
(there it is the recall, too), and of those that the product suspects, as many as it estimates. Other scores rank the same answers: the mean
and the sum of −log p of the label's tokens, the number of contradicted tokens, and the largest margin without log n.

The estimate counts on the teacher's probabilities. *too sure* is what it would be with a teacher of the same tokens whose probabilities are
squared and brought to one again (temperature 1/2).

The last table is of right answers alone: how often the teacher contradicts them, what it expects itself, and in how many of its tokens with
p ≥ 0.9 it is right: what it is surely wrong about is a false alarm at any share.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import argument_parser, finish, machine, print_table
from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.demo.run import TEACHER, DemoRecipe, make_world
from pipelines.demo.world import train_rows
from pipelines.judge.labels.answers import JudgedAnswer, answers_of
from pipelines.judge.labels.reading import Reader, source_of
from pipelines.judge.labels.survey import Survey, survey
from pipelines.judge.labels.tally import LabelTally
from pipelines.settings import CaptureSettings
from student_train.teacher_view import TeacherHeads
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.signal_records import TopK
from teacher_cache.teachers.transformers import TeacherSpec

FIELDS: dict[str, dict[str, Any]] = {"response_topk": {"k": 8}}
SURE = 0.9
TARGETS = {"precision at the planted share": 0.9, "recall": 0.8}
SCORES: Mapping[str, Callable[[JudgedAnswer], float]] = {
    "margin - log n": lambda one: one.score,
    "margin": lambda one: one.margin,
    "sum of -log p": lambda one: one.nll,
    "mean of -log p": lambda one: one.nll / max(1, one.tokens),
    "contradicted tokens": lambda one: one.contradicted + 1e-3 * one.margin,
}


@dataclass(frozen=True)
class Labelled:
    """An answer of which is known whether it was made wrong.

    sure: its tokens where the teacher's likeliest has p ≥ ``SURE``; sure_right: those of them where that is the label.
    """

    answer: JudgedAnswer
    family: str
    wrong: bool
    sure: int
    sure_right: int


def make(folder: Path, rows: int, seed: int, share: float) -> TeacherCache:
    """The world and its cache in ``folder``."""
    recipe = DemoRecipe(captions=0, train=rows, heldout=7, defects=0, wrong_answers=share)
    _, data = make_world(folder / "world", recipe, seed)
    settings = CaptureSettings(shards=4, fields=tuple(FIELDS), workers=1)
    capture(CaptureRequest(TeacherSpec(str(TEACHER)), data[1:], str(folder / "cache"), settings, FIELDS))
    return TeacherCache(str(folder / "cache"))


def labelled(cache: TeacherCache, folder: Path, rows: int, seed: int) -> Iterator[Labelled]:
    """Every answer of a world."""
    planted = {(one["row"], one["turn"]) for one in json.loads((folder / "world" / "wrong_answers.json").read_text())}
    families = [[turn.family for turn in row.turns] for row in train_rows(rows, seed)]
    reader = Reader(cache)
    cached, signals = reader.open(), TeacherHeads.open(cache, reader.served, torch.device("cpu"))
    for one in reader.read(cached, signals, max(cached.counts)):
        ordinal = one.row.sample.ordinal
        same, p = one.said.likeliest == one.row.text.response_ids.to(torch.int64), one.said.log_likeliest.exp()
        for answer in answers_of(one.row.text, one.said, reader.ends):
            own = slice(answer.first, answer.first + answer.tokens)
            sure = p[own] >= SURE
            family, wrong = families[ordinal][answer.number], (ordinal, answer.number) in planted
            yield Labelled(answer, family, wrong, int(sure.sum()), int((sure & same[own]).sum()))


@dataclass(frozen=True)
class TooSure:
    """The signals of a cache with every distribution at temperature 1/2 (what lies outside of the head counts as one token)."""

    signals: TeacherHeads

    def of_response(self, records: Mapping[str, list[Any]]) -> Any:
        told: Any = self.signals.of_response(records)
        topk: TopK = told.topk
        doubled = torch.cat([topk.log_probs, topk.log_tail[:, None]], dim=1).float().mul(2).log_softmax(dim=1)
        return replace(told, topk=replace(topk, log_probs=doubled[:, :-1], log_tail=doubled[:, -1]))


def estimate_too_sure(cache: TeacherCache) -> float:
    """Wrong answers that such a teacher would have estimated."""
    reader = Reader(cache)
    rows, tallies = reader.open(), defaultdict[str, LabelTally](LabelTally)
    signals: Any = TooSure(TeacherHeads.open(cache, reader.served, torch.device("cpu")))
    for one in reader.read(rows, signals, max(rows.counts)):
        for answer in answers_of(one.row.text, one.said, reader.ends):
            tallies[source_of(one.row.sample)].add(answer)
    return sum(one.wrong for one in tallies.values() if one.estimable)


def ranked(answers: Sequence[Labelled], score: Callable[[JudgedAnswer], float]) -> float:
    """Precision, and recall, of as many answers as were planted."""
    planted = sum(one.wrong for one in answers)
    first = sorted(answers, key=lambda one: -score(one.answer))[:planted]
    return sum(one.wrong for one in first) / max(1, planted)


def judge(answers: Sequence[Labelled], made: Survey, too_sure: float) -> dict[str, Any]:
    """Of one world."""
    planted = [one for one in answers if one.wrong]
    suspected = [one for one in answers if one.answer.score >= made.cut]
    hits = sum(one.wrong for one in suspected)
    return {
        "answers": len(answers),
        "planted": len(planted),
        "estimated": round(made.wrong, 1),
        "estimated, too sure": round(too_sure, 1),
        "suspected": len(suspected),
        "precision": hits / max(1, len(suspected)),
        "recall": hits / max(1, len(planted)),
        "at the planted share": {name: ranked(answers, score) for name, score in SCORES.items()},
        "seconds a thousand rows": round(1000 * made.seconds / max(1, made.rows), 3),
    }


def by_family(worlds: Sequence[tuple[Sequence[Labelled], Survey]]) -> dict[str, dict[str, float]]:
    """Over all worlds of one share: what is found of the planted answers, and how much of what is suspected is planted."""
    found: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for answers, made in worlds:
        for one in answers:
            found[one.family].append((one.wrong, one.answer.score >= made.cut))
    return {
        family: {
            "answers": len(pairs),
            "planted": sum(wrong for wrong, _ in pairs),
            "precision": _share(wrong for wrong, suspected in pairs if suspected),
            "recall": _share(suspected for wrong, suspected in pairs if wrong),
        }
        for family, pairs in sorted(found.items())
    }


def teacher_errors(answers: Sequence[Labelled]) -> dict[str, dict[str, float]]:
    """Of right answers, by family."""
    families = sorted({one.family for one in answers})
    right = {family: [one for one in answers if one.family == family and not one.wrong] for family in families}
    return {
        family: {
            "answers": len(own),
            "contradicted": _share(one.answer.contradicted > 0 for one in own),
            "expected": sum(one.answer.doubt for one in own) / max(1, len(own)),
            "sure tokens": sum(one.sure for one in own) / max(1, sum(one.answer.tokens for one in own)),
            "right where sure": sum(one.sure_right for one in own) / max(1, sum(one.sure for one in own)),
        }
        for family, own in right.items()
    }


def _share(values: Any) -> float:
    listed = [bool(one) for one in values]
    return sum(listed) / len(listed) if listed else math.nan


def parse(arguments: Sequence[str] | None) -> Any:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--work", type=Path, help="keeps worlds and caches; default: a temporary folder")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.2, 0.4])
    return parser.parse_args(arguments)


def measure(options: Any, work: Path) -> dict[str, Any]:
    shares: dict[str, Any] = {}
    everything: list[Labelled] = []
    for share in options.shares:
        worlds, judged = [], {}
        for seed in options.seeds:
            folder = work / f"w{seed}-{share}"
            cache = make(folder, options.rows, seed, share)
            answers = list(labelled(cache, folder, options.rows, seed))
            worlds.append((answers, survey(cache, 0)))
            judged[str(seed)] = judge(*worlds[-1], estimate_too_sure(cache))
            everything += answers
        shares[str(share)] = {"seeds": judged, "families": by_family(worlds)}
    return {"shares": shares, "teacher on right answers": teacher_errors(everything)}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, options.work or Path(folder))
    body = {"machine": machine("cpu"), "shapes": "demo", "rows": options.rows, "targets": TARGETS, **found}
    report(body)
    finish("label_errors", body, options.save)


def report(body: dict[str, Any]) -> None:
    rows = []
    for share, of in body["shares"].items():
        for seed, one in of["seeds"].items():
            counts = (one["planted"], one["estimated"], one["estimated, too sure"])
            shares = (one["precision"], one["recall"], *(one["at the planted share"][name] for name in SCORES))
            rows.append((share, seed, *counts, *map(_percent, shares)))
    print_table(("share", "seed", "planted", "estimated", "too sure", "precision", "recall", *SCORES), rows)
    print()
    families = [
        (share, family, one["planted"], _percent(one["precision"]), _percent(one["recall"]))
        for share, of in body["shares"].items()
        for family, one in of["families"].items()
    ]
    print_table(("share", "family", "planted", "precision", "recall"), families)
    print()
    names = ("contradicted", "expected", "sure tokens", "right where sure")
    errors = body["teacher on right answers"]
    print_table(
        ("family", *names), [(family, *(_percent(one[name]) for name in names)) for family, one in errors.items()]
    )


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()
