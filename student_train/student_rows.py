"""The rows of a cache as one student reads them for one method: template, limits, and what both sides must agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from student_train.compression import compressor_of, with_grid
from student_train.dataset import TrainDataset
from student_train.methods import Method, hook
from student_train.needs import Served, row_aligned
from student_train.order import Positions
from student_train.sample_columns import Column
from teacher_cache.preparing.known_text import same_text_side
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples


def compares_rows(method: Method | None, served: Served) -> bool:
    """Whether vision row i of the student is compared with row i of the teacher."""
    return bool(row_aligned() & served.fields.keys()) and not (method and hook(method, "alignment")())


def student_rows(
    cache: TeacherCache,
    parts: Sequence[str],
    rows: CachedSamples,
    order: Positions,
    processor: Any,
    config: Any,
    method: Method | None,
    served: Served,
    max_length: int | None = None,
    columns: Sequence[Column] = (),
) -> TrainDataset:
    """Positions of ``order`` → rows of ``parts`` prepared by the student's processor, for its configuration.

    Args:
        method: None where somebody else computes the loss. max_length: another limit of tokens than the capture's.
    """
    reader = with_grid(processor, compressor_of(config), training=True)
    # A row that the capture cut at a turn border must be cut at the same border here.
    preparer = Preparer.like(cache.plan.preparation, reader, config, max_length)
    matching = hook(method, "alignment")() if method else None
    return TrainDataset(
        rows,
        order,
        preparer,
        {part: cache.template(part) for part in parts},
        cache.image_limits(),
        same_grid=compares_rows(method, served),
        check_layouts=matching.check_layouts if matching else None,
        known_text=same_text_side(preparer.fingerprint(), cache.plan.preparation),
        columns=columns,
    )
