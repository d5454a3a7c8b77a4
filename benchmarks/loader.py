"""Does the loader keep up: beside the student that it feeds, beside the ``webdataset`` library, and from an object store?

    python -m benchmarks.loader [--repeats 5] [--rows 512] [--save]

*Loader*: training's own stream of batches (training order; read, check, decode, images, collate), nothing else done with them; in this
process, and by one and two loader processes. *Student*: the trainer's step on batches in memory. *Raw*: the members' bytes of all columns
of a run, read by the cache's reader (every checksum checked) in training order, and by ``webdataset`` from the same tars in tar order, its
columns zipped by key. *Store*: micro-batches in training order from an S3 API on loopback (moto, a process of its own), with the requests
that they cost.
Targets: loader / student ≥ 20; ours / webdataset ≥ 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import argument_parser, finish, interleave, machine, median_ratio, print_table, spread, timed
from benchmarks.step_variants import COMPACT, FIELDS_OF, SFT, STANDARD, STORE_OF, build_variant, write_caches
from benchmarks.worlds import World, open_world
from student_train.order import Order
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.shards.disk_cache import DiskCache

READ = (SFT, STANDARD, COMPACT)
PROCESSES = (0, 1, 2)
STUDENT_TARGET, WEBDATASET_TARGET = 20.0, 1.0
BATCH = 16


def parse(arguments: Sequence[str] | None) -> Any:
    parser = argument_parser(__doc__ or "")
    parser.add_argument(
        "--rows", type=int, default=512, help="rows of the mixture; a quarter is captions, not read here"
    )
    parser.add_argument("--steps", type=int, default=4, help="the student's steps in one repeat")
    parser.add_argument("--no-store", action="store_true", help="leave the object store out")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Columns:
    """All that a run reads of one cache, row by row in training order, as bytes."""

    cache: TeacherCache
    fields: tuple[str, ...]

    def rows(self, disk: DiskCache | None = None) -> CachedSamples:
        return CachedSamples(self.cache, ["sft"], self.fields, disk)

    def read_ours(self) -> int:
        """Members of every row, in training order; how many bytes."""
        columns = {name: self.cache.column(name) for name in ("samples", *self.fields)}
        shards, count = self.cache.shards(["sft"]), 0
        order = Order([columns["samples"].commit(shard).written for shard in shards], seed=0)
        for position in range(order.rows):
            index, row = order.at(position)
            for column in columns.values():
                count += sum(len(member) for member in column.read(shards[index], row).values())
        return count

    def read_webdataset(self) -> int:
        """The same members by the library, columns zipped by key."""
        import webdataset

        streams = []
        for name in ("samples", *self.fields):
            column = self.cache.column(name)
            folder = f"{self.cache.storage.root}/{column.column}/data"
            tars = [f"{folder}/{column.commit(shard).tar}" for shard in self.cache.shards(["sft"])]
            streams.append(webdataset.WebDataset(tars, shardshuffle=False))
        count = 0
        for row in zip(*streams, strict=True):
            if len({one["__key__"] for one in row}) > 1:
                raise RuntimeError("columns of one cache are not in one order")
            count += sum(len(value) for one in row for value in one.values() if isinstance(value, bytes))
        return count

    def read_store(self, disk: DiskCache | None) -> None:
        """Every row decoded, micro-batch by micro-batch."""
        rows = self.rows(disk)
        order = Order(rows.counts, seed=0)
        rows.expect(order.shards_of(0, 0), [])
        for start in range(0, order.rows, BATCH):
            rows.read_many([order.at(one) for one in range(start, min(start + BATCH, order.rows))])


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    described = machine(options.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = open_world(options, folder, options.rows)
        url = str(folder / "cache")
        write_caches(world, url)
        columns = {one: Columns(TeacherCache(f"{url}/{STORE_OF[one]}"), FIELDS_OF[one]) for one in READ}
        rows = sum(columns[SFT].rows().counts)
        body = {
            "machine": described,
            "shapes": options.shapes,
            "models": world.describe(),
            "rows": rows,
            "repeats": options.repeats,
            **beside_the_student(options, world, url, rows),
            **beside_webdataset(options, columns[STANDARD], rows),
            **({} if options.no_store else {"store": from_a_store(options, columns[STANDARD], rows, folder)}),
            "targets": {"loader / student": STUDENT_TARGET, "ours / webdataset": WEBDATASET_TARGET},
        }
    report(body)
    finish("loader", body, options.save)


def beside_the_student(options: Any, world: World, url: str, rows: int) -> dict[str, Any]:
    """Rows a second of the loader (by its processes) and of the student, in turns, and their ratios."""
    batch = min(BATCH, rows)
    whole = rows // batch
    runs: dict[str, Callable[[], float]] = {}
    for name in READ:
        variant = build_variant(name, world, url, batch, 0, max(whole, options.steps))
        steps = variant.steps(options.steps)
        runs[f"student {name}"] = lambda v=variant, s=steps: timed(partial(v.run, s), world.device)  # type: ignore[misc]
        for count in PROCESSES:
            loading = build_variant(name, world, url, batch, count, max(whole, options.steps))
            runs[f"loader {name}, {count}"] = lambda v=loading: load(v.batches_from, whole)  # type: ignore[misc]
    interleave(runs, 1)  # warm-up
    seconds = interleave(runs, options.repeats)
    a_row = {}
    for name, values in seconds.items():
        count = batch * options.steps if name.startswith("student") else batch * (whole - 1)
        a_row[name] = [one / max(1, count) for one in values]
    return {
        "ms_a_row": {name: [1e3 * one for one in spread(values)] for name, values in a_row.items()},
        "loader / student": {
            f"{name}, {count}": round(median_ratio(a_row[f"student {name}"], a_row[f"loader {name}, {count}"]), 2)
            for name in READ
            for count in PROCESSES
        },
    }


def load(batches_from: Callable[[int], Iterator[Any]], steps: int) -> float:
    """Seconds for all batches but the first, with which loader processes have started."""
    stream = batches_from(0)
    next(stream)
    started = time.perf_counter()
    for _ in range(steps - 1):
        next(stream)
    return time.perf_counter() - started


def beside_webdataset(options: Any, columns: Columns, rows: int) -> dict[str, Any]:
    if columns.read_ours() != columns.read_webdataset():
        raise RuntimeError("the two readers do not read the same bytes")
    runs = {
        "ours": lambda: timed(columns.read_ours, "cpu"),
        "webdataset": lambda: timed(columns.read_webdataset, "cpu"),
    }
    seconds = interleave(runs, options.repeats)
    return {
        "raw_ms_a_row": {name: [1e3 * one / rows for one in spread(values)] for name, values in seconds.items()},
        "ours / webdataset": round(median_ratio(seconds["webdataset"], seconds["ours"]), 3),
    }


def from_a_store(options: Any, local: Columns, rows: int, folder: Path) -> dict[str, dict[str, float]]:
    """ms a row and requests per 1,000 rows: without a local cache, with an empty one, with a full one."""
    import fsspec

    with s3_service(folder), counted_requests() as requests:
        files = fsspec.filesystem("s3")
        files.mkdir("bucket")
        files.put(local.cache.storage.root, "bucket/cache", recursive=True)
        columns = Columns(TeacherCache("s3://bucket/cache"), local.fields)
        kept = [folder / f"kept-{number}" for number in range(options.repeats)]
        table: dict[str, dict[str, list[float]]] = {}
        for number in range(options.repeats):
            disk = DiskCache(kept[number], 1 << 40)
            for name, one in (("no local cache", None), ("empty local cache", disk), ("full local cache", disk)):
                requests.clear()
                seconds = timed(partial(columns.read_store, one), "cpu")
                line = table.setdefault(name, {"ms a row": [], "requests per 1,000 rows": []})
                line["ms a row"].append(1e3 * seconds / rows)
                line["requests per 1,000 rows"].append(1e3 * len(requests) / rows)
    return {name: {what: round(median(values), 3) for what, values in one.items()} for name, one in table.items()}


@contextmanager
def s3_service(folder: Path) -> Iterator[None]:
    """moto's S3 in a process of its own, named to this one's libraries by the environment."""
    import socket

    from s3fs import S3FileSystem

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    before = dict(os.environ)
    log = (folder / "s3.log").open("wb")
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.1)
        names = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update(names, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
        yield
    finally:
        server.terminate()
        server.wait()
        log.close()
        os.environ.clear()
        os.environ.update(before)
        S3FileSystem.clear_instance_cache()  # the next service has another address


@contextmanager
def counted_requests() -> Iterator[list[str]]:
    """Names of the requests that s3fs makes, as they are made."""
    from s3fs import S3FileSystem

    real, made = S3FileSystem._call_s3, []

    async def call(self: Any, method: str, *arguments: Any, **named: Any) -> Any:
        made.append(method)
        return await real(self, method, *arguments, **named)

    S3FileSystem._call_s3 = call
    try:
        yield made
    finally:
        S3FileSystem._call_s3 = real


def report(body: dict[str, Any]) -> None:
    lines = []
    for name in READ:
        student = body["ms_a_row"][f"student {name}"][1]
        loads = [body["ms_a_row"][f"loader {name}, {count}"][1] for count in PROCESSES]
        ratios = [body["loader / student"][f"{name}, {count}"] for count in PROCESSES]
        lines.append((name, f"{student:.2f}", *(f"{ms:.2f} ({ratio:.1f})" for ms, ratio in zip(loads, ratios))))
    loaders = ("in process" if count == 0 else f"{count} loader process{'es' * (count > 1)}" for count in PROCESSES)
    print_table(("ms a row (rows a second over the student's)", "student", *loaders), lines)
    print()
    raw = [(name, f"{values[1]:.3f}") for name, values in body["raw_ms_a_row"].items()]
    print_table(("members as bytes", "ms a row"), [*raw, ("ours / webdataset", body["ours / webdataset"])])
    print()
    if "store" in body:
        columns = ("ms a row", "requests per 1,000 rows")
        print_table(
            ("object store", *columns), [(name, *(one[c] for c in columns)) for name, one in body["store"].items()]
        )
        print()


if __name__ == "__main__":
    main()
