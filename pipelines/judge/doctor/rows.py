"""What the doctor looks at in one group of rows: in a thread, or in a worker process that has a tokenizer of its own."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.judge.doctor.advice import OF_IMAGES
from pipelines.judge.doctor.report import Example
from teacher_cache.errors import KdcliError, SkipSample
from teacher_cache.preparing.prepare import Limits, Preparer
from teacher_cache.records import ROLES, Prepared, RowGroup, Sample, SkipRecord
from teacher_cache.samples import left_out
from teacher_cache.sources import DataSpec, open_source
from teacher_cache.sources.usable_samples import check_sample, image_extension
from teacher_cache.teachers.backends import load_processor
from teacher_cache.teachers.label_ends import LabelEnds, label_ends
from teacher_cache.teachers.transformers import TeacherSpec

_DETAIL_CHARACTERS = 160
_TAIL = 16
"""Tokens shown of a row's end."""


@dataclass(frozen=True)
class Reading:
    """Whose tokens rows become; pickles to worker processes.

    Attributes:
        limits: as the capture's. show: usable rows of each group whose last tokens are kept.
    """

    teacher: TeacherSpec
    limits: Limits
    show: int = 0


@dataclass
class Tally:
    """Counts of one group, merged into its part's in file order so that a report is the same on every run.

    Attributes:
        pictured: reason → defective rows that have an image. ends: (kind, last label) → rows, of answers that end in no end token.
        shown: see ``tail_of``.
    """

    counts: Counter[str] = field(default_factory=Counter)
    pictured: Counter[str] = field(default_factory=Counter)
    found: list[tuple[str, Example]] = field(default_factory=list)
    ids: list[tuple[bytes, Example]] = field(default_factory=list)
    images: list[tuple[bytes, Example]] = field(default_factory=list)
    ends: Counter[tuple[str, int]] = field(default_factory=Counter)
    shown: list[dict[str, Any]] = field(default_factory=list)


class RowExaminer:
    """Checks rows as ``cache-teacher`` would; with a ``reading`` by the very code that prepares them there.

    Raises:
        DataError: a part cannot be opened. CompatibilityError: the model cannot use a part's template.
    """

    def __init__(self, specs: Sequence[DataSpec], reading: Reading | None):
        # Every part is opened first: a mistyped last path shows before an hour is spent on the first.
        self.specs, self.reading = list(specs), reading
        self.sources = [open_source(spec) for spec in specs]
        self.preparer: Preparer | None = None
        self.ends: LabelEnds | None = None
        if reading is not None:
            self.preparer = Preparer(*load_processor(reading.teacher), reading.limits)
            for template in sorted({spec.template for spec in specs}):
                self.preparer.check_template(template)
            self.ends = label_ends(reading.teacher, self.preparer)

    def __call__(self, part: int, group: RowGroup) -> Tally:
        """The rows of one group of part number ``part``."""
        tally = Tally()
        for row in self.sources[part].read(group):
            example = Example(row.place, row.source_id, "")
            tally.counts["rows"] += 1
            if row.source_id:
                tally.ids.append((_digest(row.source_id.encode()), example))
            if isinstance(row, SkipRecord):
                tally.found.append((row.reason, _example(row, row.detail)))
                tally.pictured[row.reason] += row.reason in OF_IMAGES
                continue
            tally.images += [(_digest(image.data), example) for image in row.images]
            self._look_at(row, self.specs[part], tally)
        return tally

    def _look_at(self, row: Sample, spec: DataSpec, tally: Tally) -> None:
        try:
            prepared = self._prepared(row, spec)
        except SkipSample as skip:
            tally.found.append((skip.reason, _example(row, skip.detail)))
            tally.pictured[skip.reason] += bool(row.images)
            return
        tally.found += [(kind, _example(row, seen)) for kind, seen in row.notes]
        tally.found += [("extension_differs", note) for note in _extension_notes(row)]
        tally.counts.update(_shape(row))
        if prepared is None or self.reading is None or self.ends is None:
            return
        tally.found += _cuts(row, prepared)
        if end := self.ends.look(prepared, spec.template):
            tally.found.append((end.kind, _example(row, end.detail)))
            tally.ends[end.kind, end.last] += 1
        if len(tally.shown) < self.reading.show:
            tally.shown.append(tail_of(row, prepared, self.ends))

    def _prepared(self, row: Sample, spec: DataSpec) -> Prepared | None:
        """None where no model is there to read it."""
        if self.preparer is None:
            check_sample(row, spec.max_image_pixels)
            return None
        try:
            return self.preparer.prepare(row, spec.template, spec.max_image_pixels)
        except (SkipSample, KdcliError, MemoryError):
            raise
        except Exception as error:  # of a model's own code: the row is what a person can look at
            raise KdcliError(f"{row.place}: cannot be prepared ({type(error).__name__}: {error})") from error


def tail_of(row: Sample, prepared: Prepared, ends: LabelEnds) -> dict[str, Any]:
    """``{"place", "source_id", "tokens", "image_tokens", "labels", "tail"}``; ``tail``: the last text tokens, each ``{"token", "id",
    "role", "label", "end"}``, where ``end`` says that generation stops at it."""
    text = prepared.text
    columns = (text.ids[-_TAIL:].tolist(), text.role[-_TAIL:].tolist(), text.response[-_TAIL:].tolist())
    tail = [
        {"token": ends.tokenizer.decode([i]), "id": i, "role": ROLES[role], "label": label, "end": i in ends.stops}
        for i, role, label in zip(*columns)
    ]
    counts = {
        "tokens": len(prepared),
        "image_tokens": len(prepared.vision_positions),
        "labels": len(prepared.response_rows),
    }
    return {"place": row.place, "source_id": row.source_id, **counts, "tail": tail}


def _example(row: Sample | SkipRecord, detail: str) -> Example:
    return Example(row.place, row.source_id, detail[:_DETAIL_CHARACTERS])


def _cuts(row: Sample, prepared: Prepared) -> Iterator[tuple[str, Example]]:
    """``cut`` for a row of which a cut left turns out, and ``cut_images`` once for every image that went with them."""
    turns, lost = left_out(row, prepared)
    if not turns:
        return
    pictures = f", {lost} of {len(row.images)} images lost" if lost else ""
    example = _example(row, f"{len(row.turns) - turns} of {len(row.turns)} turns kept{pictures}")
    yield "cut", example
    for _ in range(lost):
        yield "cut_images", example


def _shape(sample: Sample) -> dict[str, int]:
    return {
        "usable": 1,
        "with_images": int(bool(sample.images)),
        "text_only": int(not sample.images),
        "multi_turn": int(sum(turn.role == "assistant" for turn in sample.turns) > 1),
        "multi_image": int(len(sample.images) > 1),
    }


def _extension_notes(sample: Sample) -> Iterator[Example]:
    for image in sample.images:
        named = os.path.splitext(image.name)[1].lower().removeprefix(".").replace("jpeg", "jpg")
        content = image_extension(image.data)
        if named in ("jpg", "png", "webp", "gif", "bmp") and content not in (named, "bin"):
            yield Example(sample.place, sample.source_id, f"{image.name!r} holds {content}")


def _digest(data: bytes) -> bytes:
    # 8 bytes: among a million rows a chance collision is a one in 30 million event, and the sets stay small.
    return hashlib.blake2b(data, digest_size=8).digest()
