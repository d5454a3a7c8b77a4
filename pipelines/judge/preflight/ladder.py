"""The ways to store a row kind that a preflight chooses among, and what is measured of each on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.judge.fidelity.compare import LIVE, compare
from pipelines.judge.fidelity.frontier import Configuration, Frontier
from pipelines.judge.fidelity.measure import DIRECTIONS
from pipelines.judge.fidelity.sources import OutputSource
from pipelines.judge.fidelity.terms import TERMS
from pipelines.judge.preflight.request import names_of
from student_train.needs import Need

STEPS = (0.1, 0.04, 0.02, 0.01)
HEADS = (4, 8, 16)
FALLBACKS = ("int8", "bf16")
MOST_ROWS = 1024
"""Token rows of a kind on which every candidate is measured, evenly over the held-out samples: neighbours say nearly the same."""


@dataclass
class Measured:
    """A candidate with what it costs and loses.

    Attributes:
        bytes_per_row, field_bytes: payload of the records, of all fields and of each. kl: nats, mean.
        head_angles: direction → degrees between gradients of the student's head.
        angles: term → degrees, whole gradient of the student's trained parameters; of those that were confirmed.
        error: why it cannot be made.
    """

    candidate: Configuration
    bytes_per_row: float = 0.0
    field_bytes: dict[str, float] = field(default_factory=dict)
    kl: float = math.nan
    head_angles: dict[str, float] = field(default_factory=dict)
    angles: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def label(self) -> str:
        return self.candidate.label

    @property
    def head_angle(self) -> float:
        """The worst; NaN where no student stands on the teacher's rows."""
        return largest(self.head_angles)

    @property
    def angle(self) -> float:
        """The worst of whole gradients; NaN where nobody asked."""
        return largest(self.angles)

    def to_json(self) -> dict[str, Any]:
        return self.candidate.to_json() | {name: value for name, value in vars(self).items() if name != "candidate"}


def largest(angles: Mapping[str, float]) -> float:
    return max((one for one in angles.values() if not math.isnan(one)), default=math.nan)


def candidates(kind: str, base: Mapping[str, Mapping[str, Any]]) -> list[Configuration]:
    """The ladder of a kind. base: field → the parameters that are not chosen here."""
    topk, hidden = names_of(kind)
    kept = {name: {k: v for k, v in base[name].items() if k not in ("k", "step", "codec")} for name in (topk, hidden)}

    def one(label: str, k: int, params: Mapping[str, Any]) -> Configuration:
        return Configuration(kind, label, {topk: {**kept[topk], "k": k}, hidden: {**kept[hidden], **params}})

    found = [one(f"top-{k} + sketch {step:g}", k, {"codec": "sketch", "step": step}) for step in STEPS for k in HEADS]
    return found + [one(f"{codec} hidden", min(HEADS), {"codec": codec}) for codec in FALLBACKS]


def terms_for(needs: frozenset[Need]) -> list[str]:
    """The terms of ``kdcli fidelity`` that stand for what methods need."""
    found = []
    for need in sorted(needs):
        kind = need.what.split("_")[0]
        if need.what in ("response_logits", "vision_logits"):
            found.append(f"{'forward' if need.direction == 'forward' else 'reverse'} KL, {kind}")
        elif need.what == "vision_raw_logits":
            found += ["reverse KL, vision", "VSD"]
        else:
            found.append({"vision_relation": "RDist", "vision_text_affinity": "VLAD"}.get(need.what, ""))
    return [name for name in dict.fromkeys(found) if name in TERMS]


class Bench:
    """Measures candidates. terms: of ``kdcli fidelity``, that some method needs."""

    def __init__(self, frontier: Frontier, terms: Sequence[str]):
        self.frontier = frontier
        aligned = frontier.student.aligned
        self.terms = [name for name in terms if aligned or not TERMS[name].aligned]

    def measure(
        self, ladder: Sequence[Configuration], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Measured]:
        """Bytes, KL and the head's gradient angles of the candidates of one kind, the cheapest first; an error where one cannot be made."""
        kind = ladder[0].kind
        if not self.frontier.rows(kind):
            return []
        names = {"error", "bytes_per_row", "field_bytes"}
        found = []
        for one, body in zip(ladder, self.frontier.measure(ladder, self.needed(kind), progress, MOST_ROWS)):
            kl = body["kl"]["mean"] if body.get("kl") else math.nan
            heads = {str(name): body[name]["head_angle"] for name in DIRECTIONS if name in body}
            found.append(Measured(one, kl=kl, head_angles=heads, **{n: body[n] for n in names if n in body}))
        return sorted(found, key=lambda one: (bool(one.error), one.bytes_per_row))

    def confirm(self, measured: Measured) -> None:
        """Whole-gradient angles of the needed terms of this kind, through the student's trained parameters."""
        kind = measured.candidate.kind
        chosen = {name: TERMS[name] for name in self.terms if self._is_of(name, kind)}
        if not chosen:
            return
        sources = self._sources(measured.candidate, {name: term.needs for name, term in chosen.items()})
        self.frontier.let_go()  # of all heads but this one's: whole gradients are as large as the student
        found = compare(chosen, self.frontier.student, sources, {})
        measured.angles = {name: one["cache"]["gradient_angle"] for name, one in found.items()}

    def _sources(self, candidate: Configuration, needs: Mapping[str, frozenset[Need]]) -> dict[str, OutputSource]:
        """The live teacher and the candidate, as ``compare`` takes them."""
        self.frontier.let_go()
        fields = {name: self.frontier.store(name, params) for name, params in candidate.fields.items()}
        return {LIVE: self.frontier.live(needs), "cache": self.frontier.source(fields, needs)}

    def needed(self, kind: str) -> list[str]:
        """Directions of the KL that needed terms of this kind have."""
        names = [name for name in self.terms if self._is_of(name, kind)]
        return [direction for direction in ("forward", "reverse") if f"{direction} KL, {kind}" in names]

    @staticmethod
    def _is_of(name: str, kind: str) -> bool:
        """Affinities have their own field, and an assignment of vision rows is judged on the captured cache."""
        return TERMS[name].rows == kind and not TERMS[name].matching
