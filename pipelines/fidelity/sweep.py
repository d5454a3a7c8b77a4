"""The frontier: many fields fitted in memory on other samples, and what the compared samples are after encode → pack → unpack → decode."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from pipelines.fidelity.rows import Row
from pipelines.fidelity.sources import Source, live_source
from pipelines.fidelity.stored import KINDS, measure_rows
from pipelines.fidelity.student import Student
from pipelines.profiles import HEAD_K
from student_train.needs import Need, Served
from student_train.teacher_view import TeacherSignals
from teacher_cache.codecs import container, row_codecs
from teacher_cache.errors import KdcliError
from teacher_cache.fields import CalibratedField, Field, create_field
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.teachers.low_rank import LowRankHead
from teacher_cache.teachers.sampling import sample_batch

STEPS = (0.4, 0.3, 0.2, 0.1, 0.05, 0.02)


@dataclass(frozen=True)
class Configuration:
    """One way to store the distributions of a row kind. fields: field → parameters, together one distribution."""

    kind: str
    label: str
    fields: Mapping[str, Mapping[str, Any]]


def configurations(kinds: Sequence[str] = KINDS) -> list[Configuration]:
    """Every configuration of the sweep; those of fields and codecs that this version lacks are left out."""
    return [one for kind in kinds for one in _of_kind(kind)]


def _of_kind(kind: str) -> list[Configuration]:
    topk, hidden, sampled = (f"{kind}_{suffix}" for suffix in ("topk", "hidden", "sampled"))

    def sketch(step: float) -> dict[str, Any]:
        return {"codec": "sketch", "step": step}

    ways: list[tuple[str, dict[str, dict[str, Any]]]] = []
    ways += [(f"top-{k}", {topk: {"k": k}}) for k in (12, 50, 128)]
    ways += [("top-50, plain", {topk: {"k": 50, "coding": "plain"}})]
    ways += [(f"threshold {k}", {sampled: {"sampler": "threshold", "k": k}}) for k in (8, 16, 50)]
    ways += [("random 50", {sampled: {"sampler": "random", "draws": 50}})]
    ways += [(f"top-{HEAD_K} + sketch {step:g}", {topk: {"k": HEAD_K}, hidden: sketch(step)}) for step in STEPS]
    ways += [(f"top-{k} + sketch 0.1", {topk: {"k": k}, hidden: sketch(0.1)}) for k in (4, 16)]
    ways += [(f"sketch {step:g}", {hidden: sketch(step)}) for step in STEPS[2:]]
    ways += [
        (f"{codec} hidden", {hidden: {"codec": codec}}) for codec in ("int4", "int8", "bf16") if codec in row_codecs()
    ]
    return [Configuration(kind, label, fields) for label, fields in ways]


def wants_of(chosen: Sequence[Configuration]) -> frozenset[str]:
    """What the teacher must compute for all of them; samples are drawn later, since it draws in one way only (``with_samples``)."""
    fields = [create_field(name, params) for one in chosen for name, params in one.fields.items()]
    return frozenset(want for field in fields for want in field.wants if not want.startswith("sampled."))


def with_samples(
    field: Field, prepared: Sequence[Prepared], outputs: Sequence[TeacherOutput], head: torch.Tensor
) -> list[TeacherOutput]:
    """The outputs with what a field of samples wants, drawn from their hidden states as a capture draws it; head W ``[V, D]``."""
    if not any(want.startswith("sampled.") for want in field.wants):
        return list(outputs)
    found = []
    for one, output in zip(prepared, outputs, strict=True):
        rows = {kind: states.to(head.dtype) for kind, states in output.hidden.items()}
        counts = {kind: [len(states)] for kind, states in rows.items()}
        drawn = sample_batch(rows, head, [one.key], counts, field.wants)
        found.append(replace(output, sampled={kind: each[0] for kind, each in drawn.items()}))
    return found


@dataclass(frozen=True)
class Fitted:
    """A field ready to encode, and the head that its records are read with (None: not of hidden states)."""

    field: Field
    head: torch.Tensor | LowRankHead | None


def fit_field(name: str, params: Mapping[str, Any], outputs: Sequence[TeacherOutput], head: torch.Tensor) -> Fitted:
    """A field fitted on calibration outputs where it needs that; head W ``[V, D]`` on the CPU. KdcliError: too few rows."""
    field = create_field(name, params)
    full = head if name.endswith("_hidden") else None
    if not field.calibrated:
        return Fitted(field, full)
    calibrated = cast(CalibratedField, field)
    fitted = calibrated.fit(outputs, head)
    low_rank = fitted.low_rank_head
    reading = LowRankHead(low_rank["weight"], low_rank["bias"]) if low_rank else full
    return Fitted(calibrated.with_calibration(fitted.tensors), reading)


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


def stored_source(
    name: str,
    kind: str,
    fitted: Mapping[str, Fitted],
    records: Sequence[Mapping[str, Any]],
    vocabulary: int,
    device: torch.device,
) -> Source:
    """A source of fields that were made in memory, read as a cache's are."""
    heads = {n: reading_head(one.head, device) for n, one in fitted.items() if one.head is not None}
    served = Served({f"{kind}_logits": tuple(fitted)}, ())
    return Source({name: TeacherSignals(served, heads, vocabulary, device)}, records)


def reading_head(head: torch.Tensor | LowRankHead, device: torch.device) -> torch.Tensor | LowRankHead:
    """On the device; float32 on a CPU, the teacher's own dtype elsewhere, as ``TeacherSignals.open`` has it."""
    if isinstance(head, LowRankHead) or device.type != "cpu":
        return head.to(device)
    return head.to(torch.float32)


class Codecs:
    """Fits and encodes each field once, whatever number of configurations holds it."""

    def __init__(
        self,
        prepared: Sequence[Prepared],
        outputs: Sequence[TeacherOutput],
        calibration: Sequence[TeacherOutput],
        head: torch.Tensor,
    ):
        self.prepared, self.outputs, self.calibration, self.head = prepared, outputs, calibration, head
        self._made: dict[str, tuple[Fitted, list[Any], int]] = {}

    def made(self, name: str, params: Mapping[str, Any]) -> tuple[Fitted, list[Any], int]:
        """(field, records, bytes) of the compared samples."""
        key = json.dumps([name, dict(params)], sort_keys=True)
        if key not in self._made:
            fitted = fit_field(name, params, self.calibration, self.head)
            outputs = with_samples(fitted.field, self.prepared, self.outputs, self.head)
            self._made[key] = (fitted, *through_codec(fitted.field, self.prepared, outputs))
        return self._made[key]


def sweep(
    outputs: Sequence[TeacherOutput],
    calibration: Sequence[TeacherOutput],
    head: torch.Tensor,
    rows: Sequence[Row],
    student: Student,
    progress: Callable[[str, int, int], None] = lambda event, done, total: None,
) -> list[dict[str, Any]]:
    """Every configuration: ``{"kind", "label", "fields", "bytes_per_row", …measure.distribution_error}``, or its ``error``.

    Args:
        outputs: the live teacher on the compared rows. calibration: on others. head: W ``[V, D]``.
    """
    chosen = configurations()
    live = live_source(outputs, head, {k: frozenset({Need(f"{k}_logits")}) for k in KINDS}, student.device)
    codecs = Codecs([row.teacher for row in rows], outputs, calibration, head)
    found = []
    for done, one in enumerate(chosen):
        progress("sweep", done, len(chosen))
        body: dict[str, Any] = {
            "kind": one.kind,
            "label": one.label,
            "fields": {n: dict(p) for n, p in one.fields.items()},
        }
        try:
            made = {name: codecs.made(name, params) for name, params in one.fields.items()}
        except KdcliError as error:
            found.append(body | {"error": str(error)})
            continue
        records = [{name: each[1][i] for name, each in made.items()} for i in range(len(outputs))]
        fields = {name: each[0] for name, each in made.items()}
        stored = stored_source(one.kind, one.kind, fields, records, len(head), student.device)
        count = sum(len(output.hidden[one.kind]) for output in outputs)
        size = sum(each[2] for each in made.values()) / max(1, count)
        found.append(body | {"bytes_per_row": size} | measure_rows(one.kind, one.kind, live, stored, student))
    return found
