"""How long a training run takes to open a cache, and how fast the loader streams it: one process of its own, for ``scale.py``.

    python -m benchmarks.scale_reading CACHE MODEL [--rows 20000]

Prints one JSON object. Imports are done before any clock starts. *walk* then touches every block of the epoch, so that what the loader
holds at most is seen without reading every row.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import pipelines.processes.quiet_threads  # noqa: F401 (before torch)
from benchmarks.memory import resident
from student_train.dataset import TrainDataset
from student_train.order import MicroBatches, Order
from student_train.stream import step_batches
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.teachers.backends import load_processor
from teacher_cache.teachers.transformers import TeacherSpec

BATCH = 16
WALK_ROWS = 64
"""Rows that the walk reads of every block of shards: nearly all shards of it are met."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("model", help="whose processor prepares the rows")
    parser.add_argument("--rows", type=int, default=20_000, help="rows to stream in training order")
    options = parser.parse_args(arguments)
    processor, config = load_processor(TeacherSpec(options.model))
    before = resident("VmRSS")
    started = time.perf_counter()
    cache = TeacherCache(options.cache)
    rows = CachedSamples(cache, cache.parts(), tuple(cache.fields))
    order = Order(rows.counts, seed=0)
    order.at(0)
    opened = time.perf_counter() - started
    after_opening = resident("VmRSS")
    templates = {part: cache.template(part) for part in cache.parts()}
    preparer = Preparer(processor, config)
    dataset = TrainDataset(rows, order, preparer, templates, cache.image_limits(), same_grid=False, known_text=True)
    streamed = min(options.rows, order.rows) // BATCH * BATCH
    started = time.perf_counter()
    for _ in step_batches(dataset, MicroBatches(streamed, BATCH, BATCH, 0, 1, 0), 0, workers=0):
        pass
    seconds = time.perf_counter() - started
    blocks = order._epoch(0)[1][:-1]
    started = time.perf_counter()
    for start in blocks.tolist():
        for position in range(start, min(start + WALK_ROWS, order.rows)):
            dataset[position]
    body = {
        "rows": order.rows,
        "open_seconds": round(opened, 3),
        "open_mib": round(after_opening - before, 1),
        "streamed_rows": streamed,
        "rows_per_second": round(streamed / seconds, 1),
        "walk_seconds": round(time.perf_counter() - started, 2),
        "mib_before": round(before, 1),
        "mib_at_most": round(resident("VmHWM"), 1),
    }
    print(json.dumps(body))


if __name__ == "__main__":
    main()
