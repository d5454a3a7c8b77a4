"""Samples of a cache as a student reads them, held against what the teacher read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import Dataset

from student_train.order import Positions
from student_train.packing import Packing, packed_rows, places_of
from student_train.sample_columns import Column, Weight
from teacher_cache.errors import CompatibilityError, SkipSample
from teacher_cache.preparing.batch import Batch, collate
from teacher_cache.preparing.known_text import KnownText
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cached_samples import CachedSample, CachedSamples
from teacher_cache.records import ImageLayout, Prepared, TextTokens

FIXES = {"unknown_token": "resize_token_embeddings and save it, or use its own tokenizer"}
"""By skip reason, where it is not the usual one."""
OF_THE_PROCESSOR = ("processor_refused", "image_too_large", "images_unread")
"""Reasons to skip a captured row that are the student's own: its processor's, not the run's template or lengths."""
MOST_REFUSED = 64
"""Rows one after the other: a student that refuses so many refuses its data."""
CheckLayouts = Callable[[str, tuple[ImageLayout, ...], tuple[ImageLayout, ...]], None]


@dataclass(frozen=True)
class TrainSample:
    """One row as the student reads it, with the teacher's decoded fields."""

    prepared: Prepared
    text: TextTokens
    fields: dict[str, Any]
    layout: tuple[ImageLayout, ...] = ()
    filler: bool = False
    columns: Mapping[str, Weight] = field(default_factory=dict)


@dataclass(frozen=True)
class RefusedSample:
    """A row that the teacher's processor took and the student's does not. line: which one, and why."""

    line: str


@dataclass(frozen=True)
class TrainBatch:
    """One micro-batch: the student's batch, and per field the decoded records of its samples in the same order.

    Attributes:
        text, layouts: of each sample as the teacher read it. student_text, student_layouts: as the student reads it.
        filler: it counts for nothing: this process has fewer samples in the step than another one, which it must keep pace with, or none
            that the student reads.
        refused: a line for every row that was left out, since the student's processor does not take it.
        columns: a weight a sample, by the ``Column`` that it is of.
    """

    batch: Batch
    text: tuple[TextTokens, ...]
    fields: dict[str, list[Any]]
    layouts: tuple[tuple[ImageLayout, ...], ...] = ()
    student_text: tuple[TextTokens, ...] = ()
    student_layouts: tuple[tuple[ImageLayout, ...], ...] = ()
    filler: bool = False
    refused: tuple[str, ...] = ()
    columns: Mapping[str, tuple[Weight, ...]] = field(default_factory=dict)


class TrainDataset(Dataset):
    """Positions of an ``Order`` → rows prepared for the student, checked against what the teacher read.

    Args:
        templates: part → template. image_limits: part → most pixels of an image. Both as the capture had them.
        same_grid: the vision layout must be the teacher's, token by token. The response token ids must be, where any field is read.
        check_layouts: further demand on (row key, teacher's layout, student's layout), a method's own.
        known_text: the student reads the stored tokens themselves, because its tokenizer and chat template are the teacher's.
        columns: numbers that every row comes with.

    A sample that the student's processor refuses is left out (``RefusedSample``); where none of a micro-batch is left, the next sample
    that can be read stands in, as a filler.
    """

    def __init__(
        self,
        rows: CachedSamples,
        order: Positions,
        preparer: Preparer,
        templates: dict[str, str],
        image_limits: dict[str, int],
        same_grid: bool,
        check_layouts: CheckLayouts | None = None,
        known_text: bool = False,
        columns: Sequence[Column] = (),
    ):
        self.columns = columns
        self.rows, self.order, self.preparer, self.templates = rows, order, preparer, templates
        self.image_limits, self.same_grid, self.check_layouts = image_limits, same_grid, check_layouts
        self.known = KnownText(preparer) if known_text else None
        self._block: tuple[int, int] | None = None

    def __getitem__(self, position: int) -> TrainSample:
        """The row there, or the next one that the student reads."""
        row = self.__getitems__([position])[-1]
        assert isinstance(row, TrainSample), "a micro-batch ends with a row"
        return row

    def __getitems__(self, positions: Sequence[int]) -> list[TrainSample | RefusedSample]:
        """A micro-batch at once: what a store is asked for its rows it is asked together."""
        rows = self.read(positions)
        if any(isinstance(row, TrainSample) for row in rows):
            return sorted(rows, key=lambda row: isinstance(row, TrainSample))
        for position in range(positions[-1] + 1, positions[-1] + MOST_REFUSED):
            (stand_in,) = self.read([position])
            if isinstance(stand_in, TrainSample):
                return [*rows, replace(stand_in, filler=True)]
        first = rows[0]
        assert isinstance(first, RefusedSample)
        raise CompatibilityError(f"{first.line}, nor any of the {MOST_REFUSED} rows after it: choose another student")

    def read(self, positions: Sequence[int]) -> list[TrainSample | RefusedSample]:
        """The rows at these positions; one that the student's processor refuses is a ``RefusedSample``."""
        if self.rows.remote and (block := self.order.block_of(positions[-1])) != self._block:
            epoch, number = self._block = block
            self.rows.expect(self.order.shards_of(epoch, number), self.order.shards_of(epoch, number + 1))
        return [self._prepare(row) for row in self.rows.read_many([self.order.at(one) for one in positions])]

    def _prepare(self, row: CachedSample) -> TrainSample | RefusedSample:
        try:
            asked = self.templates[row.sample.part], self.image_limits[row.sample.part]
            if self.known:
                prepared = self.known.prepare(row.sample, row.text, row.key, *asked)
            else:
                prepared = self.preparer.prepare(row.sample, *asked)
        except SkipSample as skip:
            if skip.reason in OF_THE_PROCESSOR:
                return RefusedSample(f"row {row.key} ({row.sample.place}): the student refuses it ({skip.detail})")
            raise CompatibilityError(
                f"row {row.key} ({row.sample.place}) was captured, but the student cannot read it ({skip}): "
                + FIXES.get(skip.reason, "give the student the capture's max_length and template")
            ) from None
        if row.fields:
            check_same_response(row.key, row.text, prepared.text)
            if self.same_grid:
                check_same_grid(row.key, row.layout, prepared.layout)
            if self.check_layouts:
                self.check_layouts(row.key, row.layout, prepared.layout)
        columns = {one.text: one.of(row) for one in self.columns}
        return TrainSample(prepared, row.text, row.fields, row.layout, columns=columns)


def check_same_response(key: str, teacher: TextTokens, student: TextTokens) -> None:
    """The teacher's rows belong to the student's response tokens only if these are equal, one by one."""
    if not torch.equal(teacher.response_ids, student.response_ids):
        theirs, ours = teacher.response_ids.tolist(), student.response_ids.tolist()
        at = next((i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b), min(len(theirs), len(ours)))
        raise CompatibilityError(
            f"row {key}: response token {at} is {theirs[at : at + 1]} for the teacher and {ours[at : at + 1]} for the student "
            f"({len(theirs)} and {len(ours)} tokens): the student needs the teacher's tokenizer and chat template"
        )


def check_same_grid(key: str, teacher: tuple[ImageLayout, ...], student: tuple[ImageLayout, ...]) -> None:
    """Row-aligned vision losses compare token i with token i: both sides must see the same views in the same grids."""

    def grids(layout: tuple[ImageLayout, ...]) -> list[list[tuple[int, int]]]:
        return [[view.grid for view in image.views] for image in layout]

    if grids(teacher) != grids(student):
        raise CompatibilityError(
            f"row {key}: vision grids differ, teacher {grids(teacher)}, student {grids(student)}: "
            "this method compares vision tokens one by one; use a student with the teacher's image size and patch size and no "
            "compressor, or method em-kd, which matches them"
        )


def join(given: Sequence[TrainSample | RefusedSample], pad_id: int, packing: Packing | None = None) -> TrainBatch:
    """Samples → one micro-batch.

    Args:
        packing: None: a row each. Else samples are in the order of the packed rows.
    """
    samples = [one for one in given if isinstance(one, TrainSample)]
    places = None
    if packing and len(samples) > 1:
        lengths = [len(one.prepared) for one in samples]
        order, places = places_of(packed_rows(lengths, packing), lengths)
        samples = [samples[i] for i in order]
    fields = {name: [one.fields[name] for one in samples] for name in samples[0].fields}
    return TrainBatch(
        collate([one.prepared for one in samples], pad_id, places),
        tuple(one.text for one in samples),
        fields,
        tuple(one.layout for one in samples),
        tuple(one.prepared.text for one in samples),
        tuple(one.prepared.layout for one in samples),
        filler=any(one.filler for one in samples),
        refused=tuple(one.line for one in given if isinstance(one, RefusedSample)),
        columns={name: tuple(one.columns[name] for one in samples) for name in samples[0].columns},
    )
