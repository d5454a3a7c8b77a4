"""How much slower is ``kdcli cache-teacher`` than the bare teacher on the same batches, and what does encoding cost?

Bare: rows read, images decoded and preprocessed, batched; ``model.model`` forward; head product on the vision and
response rows. Nothing is kept. Capture: the product's own line (``cache_shard``) with the fields of each profile, which does the
same and also takes top-k, gathers, encodes, writes, hashes and commits. Both prepare the next window in a thread while the teacher
works. ``samples only`` asks no teacher: what is left of the line without one.

    python -m benchmarks.capture [--repeats 5] [--save]
    python -m benchmarks.capture --device cuda --shapes real

Prints throughput and the ratio capture / bare (target: at least 0.90), the cost of encoding beside the teacher's forward (target: at
most 5 % for ``standard``), then where the time of one capture goes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import torch

from benchmarks.coding_cost import Fields, encoding_cost
from benchmarks.common import (
    argument_parser,
    finish,
    interleave,
    machine,
    median_ratio,
    print_table,
    spread,
    synchronize,
    timed,
)
from benchmarks.worlds import World, fit_fields, open_world
from pipelines.capture.profiles import PROFILES
from pipelines.settings import CaptureSettings
from teacher_cache.capturing import behind
from teacher_cache.capturing import cache_shard as line
from teacher_cache.capturing.cache_shard import cache_shard, prepare_windows, read_ahead
from teacher_cache.capturing.capture_job import CaptureJob
from teacher_cache.fields import Field, create_field
from teacher_cache.models.head import CHUNK_BYTES, chunk_rows, head_logits
from teacher_cache.planning.plan import Plan
from teacher_cache.planning.plan_file import write_plan
from teacher_cache.preparing.batch import collate, token_batches
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Prepared
from teacher_cache.shards.storage import Storage
from teacher_cache.shards.writer import ShardWriter
from teacher_cache.sources import open_source
from teacher_cache.teachers import signals
from teacher_cache.teachers.transformers import TransformersTeacher

SPEED_TARGET, ENCODE_TARGET = 0.90, 0.05
COLUMNS = {"none": "samples only", "compact": "compact", "standard": "standard", "exact": "exact"}
"""Profile → what the tables call it."""
WINDOW_ROWS = 64
"""Rows prepared and written at a time, here: a shard of this small world then has several windows, as those of a real job have."""
HASH = "0" * 64


@dataclass
class Bench:
    """One world, one plan of one shard a part, one loaded teacher."""

    world: World
    plan: Plan
    preparer: Preparer
    teacher: TransformersTeacher
    folder: Path
    batch_tokens: int

    def fields(self, profile: str) -> dict[str, Field]:
        """The fields of a profile, calibrated as a capture would have them."""
        fields = {name: create_field(name, params) for name, params in PROFILES[profile].items()}
        new: Any = {name: one for name, one in fields.items() if one.calibrated}
        fitted = fit_fields(self.plan, self.preparer, self.teacher, new) if new else {}
        return fields | {name: new[name].with_calibration(fitted[name].tensors) for name in new}

    def job(self, fields: Fields) -> CaptureJob:
        """A capture into a fresh folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        storage = Storage(str(self.folder))
        write_plan(storage, self.plan)
        return CaptureJob(storage, self.plan, dict.fromkeys(fields, HASH), fields, batch_tokens=self.batch_tokens)

    def capture(self, fields: Fields) -> float:
        """Seconds of the whole capture; planning, calibration and descriptions, which are done once a cache, are not in it."""
        job = self.job(fields)

        def run() -> None:
            for shard in range(len(self.plan.slices)):
                source = open_source(self.plan.spec(self.plan.slices[shard].part))
                cache_shard(job, shard, job.columns(shard), source, self.preparer, self.teacher)

        return timed(run, self.world.device)

    def batches(self) -> Iterator[list[Prepared]]:
        """The teacher's batches, the next window prepared in a thread as a capture does."""
        job = self.job({})
        for shard in range(len(self.plan.slices)):
            source = open_source(self.plan.spec(self.plan.slices[shard].part))
            for window in read_ahead(prepare_windows(job, shard, source, self.preparer)):
                for indices in token_batches(window.prepared, self.batch_tokens):
                    yield [window.prepared[i] for i in indices]

    @torch.inference_mode()
    def bare(self) -> float:
        def run() -> None:
            for prepared in self.batches():
                self._forward(prepared)

        return timed(run, self.world.device)

    def _forward(self, prepared: Sequence[Prepared]) -> None:
        batch = collate(prepared, self.teacher.pad_id).to(self.teacher.device)
        states = self.teacher.model.model(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        rows = chunk_rows(self.teacher.head, CHUNK_BYTES)
        for kind in ("vision", "response"):
            for chunk in states[batch.rows[kind]].split(rows):
                head_logits(chunk, self.teacher.head)


def make_bench(world: World, folder: Path, batch_tokens: int) -> Bench:
    return Bench(world, *world.open_capture(), folder / "cache", batch_tokens)


STAGES = (
    (Preparer, "prepare", "prepare (own thread)"),
    (TransformersTeacher, "hidden", "teacher forward"),
    (signals, "topk_rows", "head product + top-k"),
    (TransformersTeacher, "__call__", "teacher, all"),
    (behind, "is_finite", "finite check"),
    (behind.container, "pack", "pack"),
    (line, "encode_sample", "encode samples"),
    (ShardWriter, "add", "write"),
    (ShardWriter, "commit", "hash + commit"),
)


@contextmanager
def stopwatch(bench: Bench, fields: Fields) -> Iterator[Counter[str]]:
    """Wall seconds inside each stage of the line, summed over its threads."""
    spent: Counter[str] = Counter()

    def watch(function: Any, stage: str) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            started = perf_counter()
            result = function(*args, **kwargs)
            synchronize(bench.world.device)
            spent[stage] += perf_counter() - started
            return result

        return watched

    with ExitStack() as stack:
        kinds = {type(one) for one in fields.values()}
        for owner, name, stage in (*STAGES, *((kind, "encode", "encode fields") for kind in kinds)):
            stack.enter_context(mock.patch.object(owner, name, watch(getattr(owner, name), stage)))
        yield spent


def breakdown(bench: Bench, fields: Fields, rows: int) -> dict[str, float]:
    """Milliseconds a row by stage, of one capture that is not part of the timing."""
    with stopwatch(bench, fields) as spent:
        spent["whole line"] = bench.capture(fields)
    spent["gather + copy to host"] = spent["teacher, all"] - spent["teacher forward"] - spent["head product + top-k"]
    return {name: round(1e3 * seconds / rows, 3) for name, seconds in spent.most_common()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--rows", type=int, default=192, help="rows of the world, a quarter of them captions")
    parser.add_argument("--batch-tokens", type=int, default=CaptureSettings().batch_tokens)
    options = parser.parse_args(arguments)
    described = machine(options.device)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(line, "WINDOW_ROWS", WINDOW_ROWS):
        world = open_world(options, Path(folder), options.rows)
        bench = make_bench(world, Path(folder), options.batch_tokens)
        columns = {name: bench.fields(profile) for profile, name in COLUMNS.items()}
        variants = {"bare": bench.bare, **{name: partial(bench.capture, fields) for name, fields in columns.items()}}
        interleave(variants, 1)  # warm-up: caches, allocators, the first batch's head check
        seconds = interleave(variants, options.repeats)
        rows = sum(one.rows for one in bench.plan.slices)
        body = {
            "machine": described,
            "shapes": options.shapes,
            "models": world.describe(),
            "rows": rows,
            "repeats": options.repeats,
            "window_rows": WINDOW_ROWS,
            "targets": {"ratio to bare": SPEED_TARGET, "encode / forward, standard": ENCODE_TARGET},
            **speeds(rows, seconds),
            "encoding_ms_per_row": encoding_cost(
                bench.teacher, bench.batches(), columns, options.repeats, options.device
            ),
            "ms_per_row_inside": {name: breakdown(bench, fields, rows) for name, fields in columns.items()},
        }
    report(body)
    finish("capture", body, options.save)


def speeds(rows: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    ratios = {name: median_ratio(seconds["bare"], values) for name, values in seconds.items()}
    return {
        "rows_per_second": {name: spread([rows / one for one in values]) for name, values in seconds.items()},
        "ratio_to_bare": {name: round(value, 4) for name, value in ratios.items() if name != "bare"},
    }


def report(body: dict[str, Any]) -> None:
    ratios = {"bare": 1.0, **body["ratio_to_bare"]}
    table = [(name, f"{speed[1]:.1f}", f"{ratios[name]:.3f}") for name, speed in body["rows_per_second"].items()]
    print_table(("capture", "rows/s", "of bare"), table)
    print()
    costs = body["encoding_ms_per_row"]
    names = list(dict.fromkeys(name for one in costs.values() for name in one))
    cells = [(name, *(f"{one[name]:.3f}" if name in one else "" for one in costs.values())) for name in names]
    print_table(("ms a row, alone", *costs), cells)
    print()
    parts = body["ms_per_row_inside"]
    stages = sorted({stage for one in parts.values() for stage in one}, key=lambda s: -parts["standard"].get(s, 0.0))
    print_table(("ms a row, inside", *parts), [(s, *(parts[c].get(s, 0.0) for c in parts)) for s in stages])
    print()


if __name__ == "__main__":
    main()
