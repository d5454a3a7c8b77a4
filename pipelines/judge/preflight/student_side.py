"""The student over the sampled rows: what keeps it from reading them as the teacher did, and the rows on which the two can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.judge.fidelity.rows import FidelitySample
from pipelines.judge.fidelity.student import Student, compared_samples
from student_train.compression import asked_for
from student_train.config import TrainSettings
from student_train.dataset import OF_THE_PROCESSOR, check_same_grid, check_same_response
from student_train.load_student import load_student, open_student
from student_train.savable import refuse_quantized
from student_train.stages import STAGES
from teacher_cache.errors import CompatibilityError, SkipSample
from teacher_cache.planning.plan import Plan, difference
from teacher_cache.preparing.fingerprint import processor_fingerprint
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Prepared


@dataclass(frozen=True)
class StudentRead:
    """How the student reads the sampled rows, before its weights are loaded.

    Attributes:
        rows, prepared: those that it reads with the teacher's response tokens, as both read them.
        tokenizer: why its token ids are not the teacher's, one line, or "". grids: why vision rows cannot be compared one by one.
        problems: rows that training would stop at, one line a kind.
    """

    rows: list[FidelitySample]
    prepared: list[Prepared]
    tokenizer: str
    grids: str
    problems: list[str]

    def of(self, ids: frozenset[str]) -> list[tuple[FidelitySample, Prepared]]:
        """The rows with these ids, as both read them."""
        return [(row, one) for row, one in zip(self.rows, self.prepared) if row_id(row) in ids]


def read_as_student(
    student: str, rows: Sequence[FidelitySample], plan: Plan, teacher: Mapping[str, Any], settings: TrainSettings
) -> StudentRead:
    """teacher: its fingerprint. settings: ``[train]``, whose ``max_length`` (tokens) and compressor count."""
    processor, config, _ = open_student(student, settings.trust_remote_code, asked_for(settings))
    refuse_quantized(config, student)
    train_length = settings.max_length
    ours = processor_fingerprint(processor)
    if teacher["tokenizer"] != ours["tokenizer"]:
        lines = "; ".join(difference(teacher["tokenizer"], ours["tokenizer"], "tokenizer")).replace(
            "cache ", "teacher "
        )
        return StudentRead([], [], f"{student}: another tokenizer than the teacher's: {lines}", "", [])
    preparer = Preparer.like(plan.preparation, processor, config)
    kept: list[tuple[FidelitySample, Prepared]] = []
    left_out: list[str] = []  # as training leaves them out
    bad: dict[str, list[str]] = {"unreadable": [], "response": [], "long": []}
    grids = ""
    for row in rows:
        spec = plan.spec(row.sample.part)
        try:
            prepared = preparer.prepare(row.sample, spec.template, spec.max_image_pixels)
            check_same_response(row.key, row.teacher.text, prepared.text)
        except SkipSample as skip:
            (left_out if skip.reason in OF_THE_PROCESSOR else bad["unreadable"]).append(str(skip))
            continue
        except CompatibilityError as error:
            bad["response"].append(str(error))
            continue
        if len(prepared) > train_length:
            bad["long"].append(f"the longest kept row has {len(prepared)} tokens")
        kept.append((row, prepared))
        grids = grids or grid_difference(row, prepared)
    bad["unreadable"] += [] if kept else left_out
    return StudentRead([row for row, _ in kept], [one for _, one in kept], "", grids, lines_of(bad, rows, train_length))


def grid_difference(row: FidelitySample, prepared: Prepared) -> str:
    try:
        check_same_grid(row.key, row.teacher.layout, prepared.layout)
    except CompatibilityError as error:
        return str(error)
    return ""


def lines_of(bad: Mapping[str, list[str]], rows: Sequence[FidelitySample], train_length: int) -> list[str]:
    """One line a kind of problem, with its first case."""
    words = {
        "unreadable": "cannot be read by the student; give it the teacher's template and a longer context",
        "response": "have other response tokens for the student; it needs the teacher's tokenizer and chat template",
        "long": f"are over [train] max_length = {train_length}: raise it, or lower --max-length",
    }
    return [f"{len(bad[kind])} of {len(rows)} rows {words[kind]} ({bad[kind][0]})" for kind in bad if bad[kind]]


def row_id(row: FidelitySample) -> str:
    """Keys repeat where two parts read one file."""
    return f"{row.sample.part}/{row.key}"


def load_side(
    settings: TrainSettings, read: StudentRead, ids: frozenset[str], device: torch.device
) -> tuple[Student, list[FidelitySample]]:
    """The student with the modules of its last stage to train, over the rows with these ids; and these rows in its order."""
    assert settings.student is not None
    torch.manual_seed(settings.seed)  # of a compressor's fresh weights, as in training
    model, processor = load_student(settings.student, "sdpa", settings.trust_remote_code, asked_for(settings))
    rows, prepared = [row for row, _ in read.of(ids)], [one for _, one in read.of(ids)]
    pad, compared = processor.tokenizer.pad_token_id or 0, compared_samples(prepared, device)
    return Student(model.to(device), rows, prepared, STAGES["DFT"].trains, pad, compared), rows
