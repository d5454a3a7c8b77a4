"""How much slower is ``kdcli cache-teacher`` than the bare teacher on the same batches?

Bare: rows read, images decoded and preprocessed, batched; ``model.model`` forward; head product on the vision and
response rows. Nothing is kept. Capture: the product's own line (``cache_shard``), which does the same and also takes
top-k, gathers, encodes, writes, hashes and commits. Both prepare the next window in a thread while the teacher works.

    python -m benchmarks.capture [--repeats 5] [--save]
    python -m benchmarks.capture --device cuda --shapes real

Prints throughput and the ratio capture / bare (target: at least 0.90), then where the time of one capture goes.
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

from benchmarks.common import argument_parser, finish, interleave, machine, median_ratio, print_table, spread, timed
from benchmarks.worlds import World, open_world
from pipelines.settings import CaptureSettings
from teacher_cache import cache_shard as line
from teacher_cache.batch import collate, token_batches
from teacher_cache.cache_shard import CaptureJob, cache_shard, prepare_windows, read_ahead
from teacher_cache.fields import create_field
from teacher_cache.plan import Plan, make_plan, write_plan
from teacher_cache.prepare import Preparer
from teacher_cache.shards.storage import Storage
from teacher_cache.shards.writer import ShardWriter
from teacher_cache.sources import open_source
from teacher_cache.teachers import transformers as backend
from teacher_cache.teachers.head import CHUNK_BYTES, chunk_rows, head_logits
from teacher_cache.teachers.transformers import TransformersTeacher

TARGET = 0.90
DEFAULT_FIELDS = CaptureSettings().fields
WITH_TOPK = (*DEFAULT_FIELDS, "response_topk", "vision_topk")
COLUMNS = {"default": DEFAULT_FIELDS, "and top-k": WITH_TOPK, "all six": (*WITH_TOPK, "affinity", "relation")}
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

    def job(self, fields: Sequence[str]) -> CaptureJob:
        """A capture into a fresh folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        storage = Storage(str(self.folder))
        write_plan(storage, self.plan)
        objects = {name: create_field(name) for name in fields}
        return CaptureJob(storage, self.plan, dict.fromkeys(fields, HASH), objects, batch_tokens=self.batch_tokens)

    def capture(self, fields: Sequence[str]) -> float:
        """Seconds of the whole capture; planning and field descriptions, which are done once a cache, are not in it."""
        job = self.job(fields)

        def run() -> None:
            for shard in range(len(self.plan.slices)):
                source = open_source(self.plan.spec(self.plan.slices[shard].part))
                cache_shard(job, shard, job.columns(shard), source, self.preparer, self.teacher)

        return timed(run, self.world.device)

    @torch.inference_mode()
    def bare(self) -> float:
        job = self.job(())

        def run() -> None:
            for shard in range(len(self.plan.slices)):
                source = open_source(self.plan.spec(self.plan.slices[shard].part))
                for window in read_ahead(prepare_windows(job, shard, source, self.preparer)):
                    for indices in token_batches(window.prepared, self.batch_tokens):
                        self._forward([window.prepared[i] for i in indices])

        return timed(run, self.world.device)

    def _forward(self, prepared: Sequence[Any]) -> None:
        batch = collate(prepared, self.teacher.pad_id).to(self.teacher.device)
        states = self.teacher.model.model(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        rows = chunk_rows(self.teacher.head, CHUNK_BYTES)
        for kind in ("vision", "response"):
            for chunk in states[batch.rows[kind]].split(rows):
                head_logits(chunk, self.teacher.head)


def make_bench(world: World, folder: Path, batch_tokens: int) -> Bench:
    preparer = Preparer(world.processor, world.teacher_config)
    plan = make_plan(world.data, len(world.data), preparer.fingerprint(), 0, image_tokens=world.image_tokens)
    teacher = TransformersTeacher.wrap(world.teacher(), world.processor)
    return Bench(world, plan, preparer, teacher, folder / "cache", batch_tokens)


STAGES = (
    (Preparer, "prepare", "prepare (own thread)"),
    (TransformersTeacher, "hidden", "teacher forward"),
    (backend, "topk_rows", "head product + top-k"),
    (TransformersTeacher, "_grams", "Gram matrices"),
    (TransformersTeacher, "__call__", "teacher, all"),
    (line, "is_finite", "finite check"),
    (line.container, "pack", "pack"),
    (line, "encode_sample", "encode samples"),
    (ShardWriter, "add", "write"),
    (ShardWriter, "commit", "hash + commit"),
)


@contextmanager
def stopwatch(bench: Bench, fields: Sequence[str]) -> Iterator[Counter[str]]:
    """Wall seconds inside each stage of the line, summed over its threads."""
    spent: Counter[str] = Counter()

    def watch(function: Any, stage: str) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            started = perf_counter()
            result = function(*args, **kwargs)
            if bench.world.device.startswith("cuda"):
                torch.cuda.synchronize()
            spent[stage] += perf_counter() - started
            return result

        return watched

    with ExitStack() as stack:
        kinds = {type(create_field(name)) for name in fields}
        for owner, name, stage in (*STAGES, *((kind, "encode", "encode fields") for kind in kinds)):
            stack.enter_context(mock.patch.object(owner, name, watch(getattr(owner, name), stage)))
        yield spent


def breakdown(bench: Bench, fields: Sequence[str], rows: int) -> dict[str, float]:
    """Milliseconds a row by stage, of one capture that is not part of the timing."""
    with stopwatch(bench, fields) as spent:
        spent["whole line"] = bench.capture(fields)
    spent["gather + copy to host"] = spent["teacher, all"] - sum(
        spent[name] for name in ("teacher forward", "head product + top-k", "Gram matrices")
    )
    return {name: round(1e3 * seconds / rows, 3) for name, seconds in spent.most_common()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--rows", type=int, default=512, help="rows of the world, a quarter of them captions")
    parser.add_argument("--batch-tokens", type=int, default=CaptureSettings().batch_tokens)
    options = parser.parse_args(arguments)
    described = machine(options.device)
    with tempfile.TemporaryDirectory() as folder:
        world = open_world(options, Path(folder), options.rows)
        bench = make_bench(world, Path(folder), options.batch_tokens)
        captures = {name: partial(bench.capture, fields) for name, fields in COLUMNS.items()}
        variants = {"bare": bench.bare, **captures}
        interleave(variants, 1)  # warm-up: caches, allocators, the first batch's head check
        seconds = interleave(variants, options.repeats)
        rows = sum(one.rows for one in bench.plan.slices)
        parts = {name: breakdown(bench, fields, rows) for name, fields in COLUMNS.items()}
    report(options, described, world, rows, seconds, parts)


def report(options: Any, described: Any, world: World, rows: int, seconds: dict, parts: dict) -> None:
    ratios = {name: median_ratio(seconds["bare"], seconds[name]) for name in seconds}
    speeds = {name: [rows / one for one in values] for name, values in seconds.items()}
    table = [(name, f"{spread(speeds[name])[1]:.1f}", f"{ratios[name]:.3f}") for name in seconds]
    print_table(("capture", "rows/s", "of bare"), table)
    stages = sorted({stage for one in parts.values() for stage in one}, key=lambda s: -parts["all six"].get(s, 0.0))
    print()
    print_table(("ms a row, inside", *parts), [(s, *(parts[c].get(s, 0.0) for c in parts)) for s in stages])
    body = {
        "machine": described,
        "shapes": options.shapes,
        "models": world.describe(),
        "rows": rows,
        "repeats": options.repeats,
        "target": TARGET,
        "rows_per_second": {name: spread(values) for name, values in speeds.items()},
        "ratio_to_bare": {name: round(value, 4) for name, value in ratios.items() if name != "bare"},
        "ms_per_row_inside": parts,
    }
    print()
    finish("capture", body, options.save)


if __name__ == "__main__":
    main()
