"""Before a capture: whether its labels will teach students to stop, from a few rows of every part."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from pipelines.capture.calibrate import mixture_reader, usable_rows
from teacher_cache.planning.plan import Plan
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Prepared
from teacher_cache.teachers.label_ends import label_ends
from teacher_cache.teachers.transformers import TeacherSpec

ROWS_OF_A_PART = 16
"""Looked at, usable or not: what a template leaves out behind an answer, it leaves out of every row."""


def label_warnings(teacher: TeacherSpec, preparer: Preparer, plan: Plan) -> list[str]:
    """One line for each thing that keeps students of a part from learning to stop."""
    templates = {part.spec.part: part.spec.template for part in plan.parts}
    return label_ends(teacher, preparer).survey(first_rows(plan, preparer), templates)


def first_rows(plan: Plan, preparer: Preparer) -> Iterator[Prepared]:
    """The usable ones among the first rows of every part's first shard."""
    reader_of = mixture_reader(plan)
    first = {one.part: shard for shard, one in reversed(list(enumerate(plan.slices)))}
    for part, shard in first.items():
        rows = (row for group in plan.slices[shard].groups for row in reader_of(shard).read(group))
        yield from usable_rows(islice(rows, ROWS_OF_A_PART), preparer, plan.spec(part))
