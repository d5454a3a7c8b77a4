"""Ways to store a row kind's distributions, measured on rows that nothing was fitted on, after encode → pack → unpack → decode.

``kdcli fidelity --sweep`` and ``kdcli preflight`` measure different ways, and both measure them here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import torch

from pipelines.judge.fidelity.sources import OutputSource, live_source
from pipelines.judge.fidelity.stored import at_once, measure_rows
from pipelines.judge.fidelity.student import Student
from student_train.needs import Need, serve
from student_train.teacher_view import TeacherHeads
from teacher_cache.codecs import container
from teacher_cache.errors import KdcliError
from teacher_cache.fields import CalibratedField, Field, GroundedField, create_field
from teacher_cache.fields.calibration import Calibration
from teacher_cache.models.low_rank import LowRankHead
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.teachers.sampling import sample_batch
from teacher_cache.wants import Wants

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Configuration:
    """One way to store the distributions of a row kind. fields: field → parameters, together one distribution."""

    kind: str
    label: str
    fields: Mapping[str, Params]

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "label": self.label,
            "fields": {name: dict(one) for name, one in self.fields.items()},
        }


@dataclass(frozen=True)
class Fitted:
    """A field ready to encode; the head that its records are read with (None: not of hidden states); what was fitted, if anything was."""

    field: Field
    head: torch.Tensor | LowRankHead | None
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Stored:
    """A field's decoded record of every compared sample, and bytes of all of them with their containers."""

    fitted: Fitted
    records: list[Any]
    size: int


class Frontier:
    """The compared samples, what the live teacher says of them and of others, and the student that is to learn from it.

    Of each field the last fit and the last records are kept until ``let_go``, and what fits of all steps have in common: ask for ways
    that share a field one after the other.

    Args:
        prepared: as the teacher reads the compared samples. outputs: live, on them. calibration: live, on others.
        head: W ``[V, D]`` on the CPU.
    """

    def __init__(
        self,
        student: Student,
        prepared: Sequence[Prepared],
        outputs: Sequence[TeacherOutput],
        calibration: Sequence[TeacherOutput],
        head: torch.Tensor,
    ):
        self.student, self.prepared, self.outputs, self.head = student, list(prepared), list(outputs), head
        self.calibration = list(calibration)
        self._fitted: dict[str, tuple[str, Fitted]] = {}
        self._stored: dict[str, tuple[str, Stored]] = {}
        self._read: dict[str, tuple[Any, torch.Tensor | LowRankHead]] = {}
        self._grounds: dict[str, Any] = {}

    def rows(self, kind: str) -> int:
        """Token rows of the compared samples."""
        return sum(len(output.hidden[kind]) for output in self.outputs)

    def fit(self, name: str, params: Params) -> Fitted:
        """The field, fitted on the other samples where it needs that; KdcliError: they are too few."""
        key = json.dumps(dict(params), sort_keys=True)
        if self._fitted.get(name, ("",))[0] != key:
            self._fitted[name] = (key, self._fit(create_field(name, params)))
        return self._fitted[name][1]

    def _fit(self, field: Field) -> Fitted:
        full = self.head if field.name.endswith("_hidden") else None
        if not field.calibrated:
            return Fitted(field, full)
        calibrated = cast(CalibratedField, field)
        if calibrated.settled_last:
            grounded = cast(GroundedField, field)
            found = grounded.fit_on(self._ground(grounded), self.head)
        else:
            found = calibrated.fit(self.calibration, self.head)
        low_rank = found.low_rank_head
        reading = LowRankHead(low_rank["weight"], low_rank["bias"], field.params["step"]) if low_rank else full
        return Fitted(calibrated.with_calibration(found.tensors), reading, found)

    def _ground(self, field: GroundedField) -> Any:
        key = json.dumps(
            [field.name, {name: one for name, one in field.params.items() if name not in field.settled_last}]
        )
        if key not in self._grounds:
            self._grounds[key] = field.ground(self.calibration, self.head)
        return self._grounds[key]

    def let_go(self) -> None:
        """Of every head that fits and records brought with them: each is as large as the teacher's own. They are made again when asked."""
        self._read.clear()
        self._fitted = {name: one for name, one in self._fitted.items() if one[1].head is None}
        self._stored = {name: one for name, one in self._stored.items() if one[1].fitted.head is None}

    def store(self, name: str, params: Params) -> Stored:
        """Encode → pack → unpack → decode of every compared sample."""
        key = json.dumps(dict(params), sort_keys=True)
        if self._stored.get(name, ("",))[0] != key:
            fitted = self.fit(name, params)
            outputs = with_samples(fitted.field, self.prepared, self.outputs, self.head)
            self._stored[name] = (key, Stored(fitted, *through_codec(fitted.field, self.prepared, outputs)))
        return self._stored[name][1]

    def serves(self, name: str, params: Params) -> bool:
        """Whether what the teacher has said is all that this field wants."""
        said = self.outputs[0]
        known = Wants(frozenset(said.hidden), {kind: one.ids.shape[1] for kind, one in said.topk.items()})
        return create_field(name, params).wants <= known

    def size(self, name: str, params: Params) -> int:
        """Bytes of all compared samples' records."""
        field = self.fit(name, params).field
        return sum(len(container.pack(field.encode(*pair))) for pair in zip(self.prepared, self.outputs))

    def source(self, fields: Mapping[str, Stored], needs: Mapping[str, frozenset[Need]]) -> OutputSource:
        """Fields that were made in memory, read as a cache's are. needs: name of the comparison → what it asks for."""
        device = self.student.device
        heads = {
            name: self._reading(name, one.fitted.head) for name, one in fields.items() if one.fitted.head is not None
        }
        params = {name: one.fitted.field.params for name, one in fields.items()}
        records = [{name: one.records[i] for name, one in fields.items()} for i in range(len(self.outputs))]
        signals = {
            name: TeacherHeads(serve(asked, params, name, ""), heads, len(self.head), device)
            for name, asked in needs.items()
        }
        return OutputSource(signals, records)

    def _reading(self, name: str, head: torch.Tensor | LowRankHead) -> torch.Tensor | LowRankHead:
        """``reading_head``, the last of each field kept: ways that share a field share it."""
        if self._read.get(name, (None,))[0] is not head:
            self._read[name] = (head, reading_head(head, self.student.device))
        return self._read[name][1]

    def live(self, needs: Mapping[str, frozenset[Need]]) -> OutputSource:
        return live_source(self.outputs, self.head, needs, self.student.device)

    def measure(
        self,
        chosen: Sequence[Configuration],
        directions: Sequence[str],
        progress: Callable[[int, int], None] = lambda done, total: None,
        most_rows: int | None = None,
    ) -> list[dict[str, Any]]:
        """Each as ``{"kind", "label", "fields", "bytes_per_row", "field_bytes", …measure.Comparison.summary}``, or with its ``error``.

        Args:
            directions, most_rows: as ``measure_rows`` takes them.
        """
        found: list[dict[str, Any]] = []
        each = at_once(self.student, directions)
        for kind in dict.fromkeys(one.kind for one in chosen):
            ours = iter([one for one in chosen if one.kind == kind])
            for group in iter(lambda: list(islice(ours, each)), []):  # noqa: B023
                progress(len(found), len(chosen))
                found += self._measure(kind, group, directions, most_rows)
        return found

    def _measure(
        self, kind: str, group: Sequence[Configuration], directions: Sequence[str], most_rows: int | None
    ) -> list[dict[str, Any]]:
        """Of one kind, so few that their gradients may stand beside each other."""
        logits, rows = frozenset({Need(f"{kind}_logits")}), max(1, self.rows(kind))
        bodies, sources = [], {}
        for one in group:
            try:
                fields = {name: self.store(name, params) for name, params in one.fields.items()}
            except KdcliError as error:
                bodies.append(one.to_json() | {"error": str(error)})
                continue
            sizes = {name: each.size / rows for name, each in fields.items()}
            bodies.append(one.to_json() | {"bytes_per_row": sum(sizes.values()), "field_bytes": sizes})
            sources[one.label] = self.source(fields, {one.label: logits})
        measured = measure_rows(kind, self.live({kind: logits}), sources, self.student, directions, most_rows)
        return [body | measured.get(body["label"], {}) for body in bodies]


def through_codec(
    field: Field, prepared: Sequence[Prepared], outputs: Sequence[TeacherOutput]
) -> tuple[list[Any], int]:
    """(decoded record of every sample, bytes of all of them with their containers): encode → pack → unpack → decode."""
    records, size = [], 0
    for one, output in zip(prepared, outputs, strict=True):
        data = container.pack(field.encode(one, output))
        size += len(data)
        records.append(field.decode(container.unpack(data)))
    return records, size


def with_samples(
    field: Field, prepared: Sequence[Prepared], outputs: Sequence[TeacherOutput], head: torch.Tensor
) -> list[TeacherOutput]:
    """The outputs with what a field of samples wants, drawn from their hidden states as a capture draws it; head W ``[V, D]``."""
    if not field.wants.sampled:
        return list(outputs)
    found = []
    for one, output in zip(prepared, outputs, strict=True):
        rows = {kind: states.to(head.dtype) for kind, states in output.hidden.items()}
        counts = {kind: [len(states)] for kind, states in rows.items()}
        drawn = sample_batch(rows, head, [one.key], counts, field.wants)
        found.append(replace(output, sampled={kind: each[0] for kind, each in drawn.items()}))
    return found


def reading_head(head: torch.Tensor | LowRankHead, device: torch.device) -> torch.Tensor | LowRankHead:
    """On the device; float32 on a CPU, the teacher's own dtype elsewhere, as ``TeacherHeads.open`` has it."""
    if isinstance(head, LowRankHead) or device.type != "cpu":
        return head.to(device)
    return head.to(torch.float32)


def wants_of_ways(chosen: Sequence[Configuration]) -> Wants:
    """What the teacher must compute for all of them; samples are drawn later, since it draws in one way only (``with_samples``)."""
    fields = [create_field(name, params) for one in chosen for name, params in one.fields.items()]
    return Wants.together(field.wants.without_samples() for field in fields)
