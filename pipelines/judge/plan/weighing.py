"""Bytes of a whole cache for one choice of fields and parameters: of the one that is planned, and of those that could be chosen instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipelines.judge.plan.column_sizes import ColumnEstimate, column_estimate, manifest_bytes, tars_by_part
from pipelines.judge.plan.field_sizes import MEASURED, FieldSize, coded_rows, size_field
from pipelines.judge.plan.mixture_sample import PartSample
from pipelines.judge.plan.teacher_cost import files_once
from teacher_cache.fields import Field, create_field
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.teachers.transformers import TeacherSpec


@dataclass(frozen=True)
class Weighed:
    """One choice of fields, and what it takes. once: bytes of files that stand in the cache once, by what they are."""

    fields: Mapping[str, Field]
    sizes: Mapping[str, FieldSize]
    columns: tuple[ColumnEstimate, ...]
    once: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(column.bytes for column in self.columns) + sum(self.once.values())


@dataclass(frozen=True)
class Weigher:
    """Everything that is the same whatever is stored of the teacher.

    Attributes:
        parts: of the mixture. bare: those of which only ``samples`` is stored. like: a cache to measure bytes on.
        measured: field → bytes a row that a preflight measured with the planned parameters.
    """

    teacher: TeacherSpec
    processor: Any
    config: Any
    parts: Sequence[PartSample]
    bare: frozenset[str]
    shards: int
    like: TeacherCache | None
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return int(self.config.get_text_config().hidden_size)

    @property
    def images(self) -> bool:
        """Whether the teacher reads images."""
        return self.processor.image_processor is not None

    @property
    def vocabulary(self) -> int:
        return min(len(self.processor.tokenizer), int(self.config.get_text_config().vocab_size))

    @property
    def full(self) -> list[PartSample]:
        return [part for part in self.parts if part.part not in self.bare]

    def sizes(self, fields: Mapping[str, Field]) -> dict[str, FieldSize]:
        """KdcliError where nothing tells how large a field's records will be."""
        heads = int(self.config.get_text_config().num_attention_heads)
        return {
            name: FieldSize(name, MEASURED, partial(coded_rows, one), per_row={"": self.measured[name]})
            if name in self.measured
            else size_field(one, self.width, self.vocabulary, self.like, heads)
            for name, one in fields.items()
        }

    def weigh(self, wanted: Mapping[str, Mapping[str, Any]]) -> Weighed:
        """wanted: field → parameters."""
        fields = {name: create_field(name, params) for name, params in wanted.items()}
        sizes, tars = self.sizes(fields), tars_by_part(self.parts, self.shards)
        columns = [column_estimate("samples", None, self.parts, tars)]
        columns += [column_estimate(f"fields/{name}", size, self.full, tars) for name, size in sizes.items()]
        known = (self.teacher, self.processor, self.config)
        once = files_once(*known, fields, self.width, self.vocabulary, self.like)
        once["plan"] = manifest_bytes(self.parts, self.shards)
        return Weighed(fields, sizes, tuple(columns), once)
