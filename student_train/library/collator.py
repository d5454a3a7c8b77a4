"""Rows of a dataset → one batch as Hugging Face models take it, and the teacher's side of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from student_train.dataset import RefusedSample, TrainBatch, TrainSample, join
from student_train.library.dataset import CacheDataset, NumberedRows
from student_train.library.signals import TeacherSignals

IGNORED = -100
"""Label of a token that no loss looks at, as in transformers."""
OURS = ("labels", "teacher")
"""Keys of a batch that are none of the model's inputs."""


class Collator:
    """``collate_fn`` of a DataLoader over a dataset, or a stream, of a cache. Pickles to loader processes.

    Returns ``input_ids``, ``attention_mask`` int64 ``[B, T]``, padded right; ``labels`` int64 ``[B, T]``, -100 where no token of a response
    stands (not shifted: Hugging Face models shift themselves); the processor's tensors (``pixel_values``, …); and ``teacher``, a
    ``TeacherSignals``, to be popped before the model is called.

    Args:
        rows: the dataset, which names the padding token and the cache.
    """

    def __init__(self, rows: CacheDataset):
        self.pad_id, self.source = rows.pad_id, rows.source

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        if len(rows) == 1 and isinstance(rows[0], NumberedRows):  # DataLoader(stream) without batch_size=None
            rows = rows[0]
        given: list[TrainSample | RefusedSample] = list(rows)
        whole = join(given, self.pad_id)
        batch = whole.batch
        labels = torch.full_like(batch.inputs["input_ids"], IGNORED)
        labels.view(-1)[batch.rows["answer"]] = batch.labels
        signals = TeacherSignals(self.source, replace(whole, batch=replace(batch, inputs={})))
        if isinstance(rows, NumberedRows):
            filler = whole.filler or rows.filler
            signals = replace(signals, number=rows.number, batch=replace(signals.batch, filler=filler))
        return {**batch.inputs, "labels": labels, "teacher": signals}


def whole_batch(batch: dict[str, Any]) -> TrainBatch:
    """A collated batch as methods' losses take it."""
    one: TrainBatch = batch["teacher"].batch
    inputs = {name: value for name, value in batch.items() if name not in OURS}
    return replace(one, batch=replace(one.batch, inputs=inputs))
