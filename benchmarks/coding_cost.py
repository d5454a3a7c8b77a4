"""What coding costs beside the model that it serves: encoding beside the teacher's forward, decoding beside a student's step.

Coding is timed alone, on one thread, in CPU seconds of that thread, so that waiting for a core on a busy machine does not count.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter, process_time, thread_time
from typing import Any
from unittest import mock

import torch

from benchmarks.common import synchronize
from teacher_cache.codecs import container
from teacher_cache.fields import Field, wants_of
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.records import Prepared
from teacher_cache.teachers.transformers import TransformersTeacher

Fields = Mapping[str, Field]
ENCODED_ROWS = 64


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def encoding_cost(
    teacher: TransformersTeacher,
    batches: Iterator[list[Prepared]],
    columns: Mapping[str, Fields],
    repeats: int,
    device: str,
) -> dict[str, dict[str, float]]:
    """By profile, medians over interleaved repeats, in ms a row: the teacher's forward (CPU of all its threads, and wall), ``encode`` and
    ``pack`` of every field on the forward's own outputs, their sum, and its share of the forward by both clocks.
    """
    every = list(batches)
    stride = -(-sum(map(len, every)) // ENCODED_ROWS)
    chosen = [batch[::stride] for batch in every]  # some of every batch: of all parts and lengths
    coded = {name: fields for name, fields in columns.items() if fields}
    runs = [
        {name: _encode_once(teacher, chosen, fields, device) for name, fields in coded.items()}
        for _ in range(repeats + 1)
    ]
    return {name: _summary([run[name] for run in runs[1:]], list(coded[name])) for name in coded}  # the first warms up


def _encode_once(
    teacher: TransformersTeacher, batches: Sequence[Sequence[Prepared]], fields: Fields, device: str
) -> dict[str, float]:
    spent: Counter[str] = Counter()
    wants = wants_of(fields.values())
    for batch in batches:
        with mock.patch.object(TransformersTeacher, "hidden", _watched_forward(spent, device)):
            outputs = teacher(batch, wants)
        with one_thread():
            for name, one in fields.items():
                began = thread_time()
                for prepared, output in zip(batch, outputs):
                    container.pack(one.encode(prepared, output))
                spent[name] += thread_time() - began
    rows = sum(map(len, batches))
    return {name: 1e3 * seconds / rows for name, seconds in spent.items()}


def _watched_forward(spent: Counter[str], device: str) -> Callable[..., torch.Tensor]:
    forward = TransformersTeacher.hidden

    def watched(*arguments: Any) -> torch.Tensor:
        cpu, wall = process_time(), perf_counter()
        states = forward(*arguments)
        synchronize(device)
        spent["forward, CPU"] += process_time() - cpu
        spent["forward, wall"] += perf_counter() - wall
        return states

    return watched


def _summary(runs: Sequence[dict[str, float]], fields: Sequence[str]) -> dict[str, float]:
    for run in runs:
        run["encode"] = sum(run[name] for name in fields)
        for clock in ("CPU", "wall"):
            run[f"encode / forward, {clock}"] = run["encode"] / run[f"forward, {clock}"]
        # CPU seconds over threads: the forward's wall time where nothing disturbs it.
        run["encode / forward, at best"] = run["encode"] / run["forward, CPU"] * torch.get_num_threads()
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}


class BatchDecoder:
    """Reads, unpacks and decodes fields of a cache for the rows of a batch, as the stream does for its rows; page cache warm."""

    def __init__(self, cache: TeacherCache, fields: Sequence[str], parts: Sequence[str]):
        self.columns = {name: cache.column(name) for name in fields}
        self.fields = {name: cache.open_field(name) for name in fields}
        self.places = {
            name: {
                entry.key: (shard, row) for shard in cache.shards(parts) for row, entry in enumerate(one.entries(shard))
            }
            for name, one in self.columns.items()
        }

    def seconds(self, batches: Sequence[Sequence[str]]) -> dict[str, float]:
        """CPU and wall seconds of one thread for batches of keys."""
        with one_thread():
            cpu, wall = thread_time(), perf_counter()
            for keys in batches:
                for name, column in self.columns.items():
                    for key in keys:
                        data = column.read(*self.places[name][key])[container.EXTENSION]
                        self.fields[name].decode(container.unpack(data, key))
            return {"cpu": thread_time() - cpu, "wall": perf_counter() - wall}
