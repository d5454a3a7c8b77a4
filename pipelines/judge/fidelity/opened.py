"""What ``kdcli fidelity`` was asked, and everything that is decided before any weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.judge.fidelity.rows import FidelityReader, FidelitySample, parts_with_fields
from pipelines.judge.fidelity.sources import same_teacher, serve_terms, teacher_spec
from pipelines.judge.fidelity.student import Student
from pipelines.judge.fidelity.terms import MATCHING, MATCHING_NEEDS, TERMS
from student_train.load_student import load_student
from student_train.load_student import open_student as load_student_processor
from student_train.needs import Need, Served, served_by
from student_train.token_ids import check_tokenizer
from teacher_cache.errors import KdcliError
from teacher_cache.preparing.fingerprint import is_text_alone, processor_fingerprint
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.complete_fields import complete_fields
from teacher_cache.teachers.transformers import TeacherSpec, resolve_device


@dataclass(frozen=True)
class FidelityRequest:
    """What ``kdcli fidelity`` was asked.

    Attributes:
        samples: how many are compared. parts: of the mixture; None: those with a field. stage: whose modules have gradients.
        dtype: of the live teacher; None: as in the capture. sweep: also fit other fields on other samples and measure them.
        batch_tokens: padded tokens of one teacher batch. trust_remote_code: run code that the student's folder brings.
    """

    cache: str
    teacher: TeacherSpec
    student: str | None
    samples: int = 32
    parts: tuple[str, ...] | None = None
    stage: str = "DFT"
    dtype: str | None = None
    seed: int = 0
    sweep: bool = False
    batch_tokens: int = 8192
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise KdcliError(f"--samples must be at least 1, got {self.samples}")
        if not self.student:
            raise KdcliError(
                "no student: gradients are compared on the actual one; give --student MODEL, or `student = …` under [train] in kd.toml"
            )


@dataclass(frozen=True)
class OpenedSides:
    """Everything that is decided before any weights are loaded."""

    cache: TeacherCache
    parts: tuple[str, ...]
    fields: list[str]
    spec: TeacherSpec
    processor: Any
    config: Any
    served: dict[str, Served]
    unserved: dict[str, Need]
    notes: list[str]


def open_cache(request: FidelityRequest) -> OpenedSides:
    """Refuses another teacher, and a cache that serves no term at all."""
    cache = TeacherCache(request.cache)
    parts = parts_with_fields(cache, request.parts)
    complete = complete_fields(cache, parts)
    if not complete:
        raise KdcliError(f"{cache.storage}: no field is complete for part {', '.join(parts)}: run `kdcli cache status`")
    spec = teacher_spec(cache, complete, request.teacher, request.dtype)
    fields, notes, processor, config = same_teacher(cache, complete, spec)
    needs = {**{name: term.needs for name, term in TERMS.items()}, MATCHING: MATCHING_NEEDS}
    if is_text_alone(cache.plan.preparation):
        needs = {name: term.needs for name, term in TERMS.items() if term.rows == "response"}
    served, unserved = serve_terms(cache, needs, fields)
    if not served:
        missing = "; ".join(dict.fromkeys(not_served(cache, need) for need in unserved.values()))
        raise KdcliError(f"{cache.storage}: no term can be compared: {missing}")
    notes += [note for one in served.values() for note in one.notes]
    return OpenedSides(cache, parts, fields, spec, processor, config, served, unserved, list(dict.fromkeys(notes)))


def not_served(cache: TeacherCache, need: Need) -> str:
    return f"needs {need}: `kdcli cache add-field {cache.storage} --field {served_by(need)[0]}`"


def open_student(
    request: FidelityRequest,
    opened: OpenedSides,
    reader: FidelityReader,
    rows: Sequence[FidelitySample],
    trains: Sequence[str],
) -> Student:
    """The student over the compared rows; CompatibilityError where its tokenizer is not the teacher's."""
    assert request.student is not None
    processor, config, _ = load_student_processor(request.student, request.trust_remote_code)
    ours = processor_fingerprint(processor)["tokenizer"]
    for name in opened.fields:
        check_tokenizer(opened.cache, name, processor.tokenizer, ours)
    prepared = reader.student_rows(rows, Preparer.like(opened.cache.plan.preparation, processor, config))
    model, _ = load_student(request.student, "sdpa", request.trust_remote_code)
    device = resolve_device(opened.spec)
    return Student(model.to(device), rows, prepared, trains, processor.tokenizer.pad_token_id or 0)


def comparable(opened: OpenedSides, student: Student) -> tuple[list[str], dict[str, str]]:
    """(terms that can be compared, term → why not)."""
    unserved = {name: not_served(opened.cache, need) for name, need in opened.unserved.items()}
    if not student.aligned:
        why = "the student's vision tokens are not the teacher's: rows cannot be compared one by one"
        unserved |= {name: why for name, term in TERMS.items() if term.aligned}
    return [name for name in TERMS if name in opened.served and name not in unserved], unserved
