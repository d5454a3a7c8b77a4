"""The candidates of one row kind, cheapest idea first, each measured on held-out rows after encode → pack → unpack → decode."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipelines.fidelity.compare import LIVE, compare
from pipelines.fidelity.measure import divergence, row_chunks, spread
from pipelines.fidelity.sources import Source, live_source
from pipelines.fidelity.stored import measure_rows
from pipelines.fidelity.student import Student
from pipelines.fidelity.sweep import Fitted, fit_field, through_codec
from pipelines.fidelity.terms import TERMS
from pipelines.preflight.request import names_of
from student_train.needs import Need, serve
from student_train.teacher_view import TeacherSignals
from teacher_cache.errors import KdcliError
from teacher_cache.records import Prepared, TeacherOutput

STEPS = (0.1, 0.04, 0.02, 0.01)
HEADS = (4, 8, 16)
FALLBACKS = ("int8", "bf16")


@dataclass(frozen=True)
class Candidate:
    """One way to store a row kind. fields: field → parameters."""

    kind: str
    label: str
    fields: Mapping[str, Mapping[str, Any]]


@dataclass
class Measured:
    """A candidate with what it costs and loses.

    Attributes:
        bytes_per_row, bytes_per_sample: payload of the records. kl: nats, mean; NaN where nobody asked, since a cheaper one was chosen.
        angles: term → degrees, whole gradient of the student's trained parameters; only of those that come near.
        head_angles: direction → degrees, of its head's gradient.
        error: why it cannot be made ("too few rows").
    """

    candidate: Candidate
    bytes_per_row: float = 0.0
    bytes_per_sample: float = 0.0
    kl: float = float("nan")
    head_angles: dict[str, float] = field(default_factory=dict)
    angles: dict[str, float] = field(default_factory=dict)
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        candidate = {"kind": self.candidate.kind, "label": self.candidate.label, "fields": self.candidate.fields}
        own = {name: value for name, value in vars(self).items() if name != "candidate"}
        return candidate | own


def candidates(kind: str, base: Mapping[str, Mapping[str, Any]]) -> list[Candidate]:
    """The ladder of a kind. base: field → the parameters that are not chosen here."""
    topk, hidden = names_of(kind)
    kept = {name: {k: v for k, v in base[name].items() if k not in ("k", "step", "codec")} for name in (topk, hidden)}

    def one(label: str, k: int, params: Mapping[str, Any]) -> Candidate:
        return Candidate(kind, label, {topk: {**kept[topk], "k": k}, hidden: {**kept[hidden], **params}})

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
    """The held-out rows, what the live teacher says of them, and the student that is to learn from it.

    Args:
        rows: the student's, as the teacher reads them. outputs: live, on them. calibration: live, on other rows.
        head: W ``[V, D]`` on the CPU.
        terms: that some method needs.
    """

    def __init__(
        self,
        student: Student,
        rows: Sequence[Prepared],
        outputs: Sequence[TeacherOutput],
        calibration: Sequence[TeacherOutput],
        head: torch.Tensor,
        terms: Sequence[str],
    ):
        self.student, self.outputs, self.head = student, outputs, head
        self.terms = [name for name in terms if student.aligned or not TERMS[name].aligned]
        self._rows, self._calibration = rows, calibration
        self._fitted: dict[str, Fitted] = {}
        self._sizes: dict[str, int] = {}

    def size(self, candidate: Candidate) -> Measured:
        """Its bytes; its error where it cannot be fitted."""
        found = Measured(candidate)
        try:
            size = sum(self._size(name, params) for name, params in candidate.fields.items())
        except KdcliError as error:
            found.error = str(error).replace("--calibration-rows", "--rows")
            return found
        kind = candidate.kind
        rows = sum(len(output.hidden[kind]) for output in self.outputs)
        found.bytes_per_row, found.bytes_per_sample = size / max(1, rows), size / max(1, len(self.outputs))
        return found

    def measure(self, found: Measured) -> None:
        """KL and the head's gradient angles."""
        candidate, kind = found.candidate, found.candidate.kind
        if not any(len(output.hidden[kind]) for output in self.outputs):
            found.kl = 0.0
            return
        live = self._live({kind: frozenset({Need(f"{kind}_logits")})})
        stored = self._stored(candidate, {kind: frozenset({Need(f"{kind}_logits")})})
        if kind == "vision" and not self.student.aligned:
            found.kl = self._kl(kind, live, stored)
            return
        body = measure_rows(kind, kind, live, stored, self.student)
        found.kl = body["kl"]["mean"]
        found.head_angles = {name: body[name]["head_angle"] for name in ("forward", "reverse") if name in body}

    def confirm(self, measured: Measured) -> None:
        """Whole-gradient angles of the needed terms of this kind, through the student's trained parameters."""
        kind = measured.candidate.kind
        chosen = {name: TERMS[name] for name in self.terms if self._is_of(name, kind)}
        if not chosen:
            return
        needs = {name: term.needs for name, term in chosen.items()}
        live, stored = self._live(needs), self._stored(measured.candidate, needs)
        found = compare(chosen, self.student, {LIVE: live, "cache": stored}, {})
        measured.angles = {name: one["cache"]["gradient_angle"] for name, one in found.items()}

    def needed(self, kind: str) -> list[str]:
        """Directions of the KL that needed terms of this kind have."""
        names = [name for name in self.terms if self._is_of(name, kind)]
        return [direction for direction in ("forward", "reverse") if f"{direction} KL, {kind}" in names]

    @staticmethod
    def _is_of(name: str, kind: str) -> bool:
        """Affinities have their own field, and an assignment of vision rows is judged on the captured cache."""
        return TERMS[name].rows == kind and not TERMS[name].matching

    def _fit(self, name: str, params: Mapping[str, Any]) -> Fitted:
        """Fitted once, since bases of wide states take seconds; what needs no fit is made anew and its float32 head let go."""
        key = json.dumps([name, dict(params)], sort_keys=True)
        if key in self._fitted:
            return self._fitted[key]
        found = fit_field(name, params, self._calibration, self.head)
        if found.field.calibrated:
            self._fitted[key] = found
        return found

    def _size(self, name: str, params: Mapping[str, Any]) -> int:
        """Payload bytes of all rows; the records are made again when they are measured, all ladders' would not fit."""
        key = json.dumps([name, dict(params)], sort_keys=True)
        if key not in self._sizes:
            self._sizes[key] = through_codec(self._fit(name, params).field, self._rows, self.outputs)[1]
        return self._sizes[key]

    def _live(self, needs: Mapping[str, frozenset[Need]]) -> Source:
        return live_source(self.outputs, self.head, needs, self.student.device)

    def _stored(self, candidate: Candidate, needs: Mapping[str, frozenset[Need]]) -> Source:
        fitted = {name: self._fit(name, params) for name, params in candidate.fields.items()}
        made = {name: through_codec(one.field, self._rows, self.outputs)[0] for name, one in fitted.items()}
        records = [{name: each[i] for name, each in made.items()} for i in range(len(self.outputs))]
        device = self.student.device
        params = {name: each.field.params for name, each in fitted.items()}
        heads = {name: each.head.to(device) for name, each in fitted.items() if each.head is not None}
        signals = {
            name: TeacherSignals(serve(asked, params, name, ""), heads, len(self.head), device)
            for name, asked in needs.items()
        }
        return Source(signals, records)

    def _kl(self, kind: str, live: Source, stored: Source) -> float:
        """nats, where no student stands on the teacher's vision rows."""
        apart = []
        for number, output in enumerate(self.outputs):
            theirs, ours = (one.view(kind, number).distributions[kind] for one in (live, stored))
            for rows in row_chunks(len(output.hidden[kind]), self.head):
                found = divergence(theirs[rows], ours[rows])  # type: ignore[arg-type]
                apart += [found] if found is not None else []
        return float(torch.cat(apart).mean()) if apart else spread([])["median"]
