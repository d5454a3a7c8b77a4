"""Does encoding hold up a teacher of a real size? Capture of ``standard`` beside the bare teacher, by number of threads that encode.

    python -m benchmarks.encode_workers [--save]            # a quarter of an hour

The teacher stands for one on a GPU: it takes 36 ms a row without using a core (it sleeps) and, for every batch, starts 2,000 small torch
operations one by one as a forward does. Its answers were drawn before: bfloat16 states of width 3,584 at 27 × 27 vision tokens and some 200
response tokens, heads of 8 out of 152,064. Rows are real ones (a JPEG of 640 × 480, prepared for 384 × 384), the line is the product's own.

What runs on the host is run and counted: copies of states to the device and of symbols back, the finite check, entropy coding, packing,
writing, hashing, commits. What runs where the teacher is (float32 copies, products with the bases, cosine transform, quantising,
ordering) was done before and is looked up: a GPU's time for it is not in these figures. For a teacher without one it is timed alone.
Symbols are those of ``codec_speed``. *Bare* reads, prepares and asks the same batches, and keeps nothing.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter, process_time, sleep, thread_time
from typing import Any
from unittest import mock

import pipelines.processes.quiet_threads  # noqa: F401 (before torch)

# isort: split
import torch

from benchmarks import real_shapes
from benchmarks.codec_speed import VOCABULARY, K, Kind, draw, heads, scales
from benchmarks.coding_cost import one_thread
from benchmarks.common import argument_parser, finish, machine, median_ratio, print_table, spread
from pipelines.settings import CaptureSettings
from teacher_cache.capturing import cache_shard as line
from teacher_cache.capturing.behind import Waits
from teacher_cache.capturing.cache_shard import cache_shard, prepare_windows, read_ahead
from teacher_cache.capturing.capture_job import CaptureJob
from teacher_cache.capturing.window_bytes import weigher
from teacher_cache.codecs import spectrum
from teacher_cache.codecs.spectrum import Grid
from teacher_cache.fields import create_field, wants_of
from teacher_cache.planning.make_plan import make_plan
from teacher_cache.planning.plan import Plan
from teacher_cache.planning.plan_file import write_plan
from teacher_cache.preparing.batch import token_batches
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.shards.storage import Storage
from teacher_cache.signal_records import TopK
from teacher_cache.sources import DataSpec, open_source
from teacher_cache.wants import Wants

TARGET, MOST_CORES = 0.95, 4
LAUNCHES = 2000
HASH = "0" * 64
GRID = Grid(0, 27, 27, 27)


@dataclass
class Answers:
    """What the teacher says, drawn before: states of both kinds, heads by (kind, rows), symbols in their order by (kind, rows)."""

    width: int
    kinds: Mapping[str, Kind]
    states: Mapping[str, torch.Tensor]
    heads: dict[tuple[str, int], TopK] = field(default_factory=dict)
    ordered: dict[tuple[str, int], Any] = field(default_factory=dict)

    @classmethod
    def drawn(cls, width: int, vision: int, most: int) -> Answers:
        grid = GRID if vision == GRID.height * GRID.width else Grid(0, 1, vision, vision)
        rows = {"vision": (vision, (grid,)), "response": (most, ()), "affinity": (vision + most, (grid,))}
        kinds = {name: Kind(name, width, count, grids, 1.0) for name, (count, grids) in rows.items()}
        states = torch.from_numpy(draw(vision + most, scales(width, False), 7))
        told = {
            "vision": spectrum.inverse(states[:vision], (grid,)),
            "response": states[vision:],
            "text": states[vision:],
        }
        return cls(width, kinds, {name: one.to(torch.bfloat16) for name, one in told.items()})

    def prepare(self, vision: int, response: int) -> None:
        """Whatever a row of so many tokens will ask for."""
        for kind, rows in (("vision", vision), ("response", response)):
            if (kind, rows) not in self.heads:
                self.heads[kind, rows] = heads(rows, rows)
        for kind, rows in (("vision", vision), ("response", response), ("affinity", vision + response)):
            if (kind, rows) not in self.ordered:
                one = self.kinds[kind]
                own = one.coder.__dict__.pop("_ordered", None)
                self.ordered[kind, rows] = one.coder._ordered(one.symbols[:rows], one.grids)[1]
                one.coder.__dict__["_ordered"] = own


class HostPart:
    """A coded field whose symbols are there, in their order; the rest of its encoding is the product's."""

    def __init__(self, answers: Answers, kind: str, states: Sequence[str]):
        self.name, self._kind, self._states = kind, kind, states
        self.wants = Wants(hidden=set(states))
        self._answers, self._one = answers, answers.kinds[kind]
        self._one.coder.__dict__["_ordered"] = self._looked_up

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        copied = [output.hidden[name].clone() for name in self._states]  # to the device
        rows = sum(map(len, copied)) if self._kind == "affinity" else len(copied[0])
        return self._one.encoded(torch.empty(rows, 0))

    def _looked_up(self, symbols: torch.Tensor, grids: Sequence[Grid]) -> tuple[Any, Any]:
        order = self._one.coder.order(len(symbols), tuple(grids))
        return order, self._answers.ordered[self._kind, len(symbols)].copy()  # from the device


class Teacher:
    """Takes ``ms`` milliseconds a row, whatever the copies of its answers take of them."""

    def __init__(self, answers: Answers, ms: float):
        self._answers, self._seconds = answers, ms / 1e3
        self.state_bytes = 2 * answers.width
        self.launches: list[float] = []
        self._small = torch.zeros(8)

    def __call__(self, prepared: Sequence[Prepared], wants: Wants) -> list[TeacherOutput]:
        began = perf_counter()
        for _ in range(LAUNCHES):
            self._small.add_(1)
        self.launches.append(perf_counter() - began)
        said = [self._say(one) for one in prepared]
        sleep(max(0.0, began + self._seconds * len(prepared) - perf_counter()))
        return said

    def _say(self, row: Prepared) -> TeacherOutput:
        rows = {"vision": len(row.vision_positions), "response": len(row.response_rows)}
        rows["text"] = rows["response"]  # the field keeps those of responses
        return TeacherOutput(
            hidden={name: self._answers.states[name][:count].clone() for name, count in rows.items()},
            topk={name: self._answers.heads[name, rows[name]] for name in ("vision", "response")},
            layout=row.layout,
        )


@dataclass
class Bench:
    plan: Plan
    preparer: Preparer
    teacher: Teacher
    fields: Mapping[str, Any]
    folder: Path

    def batches(self, job: CaptureJob) -> Iterator[list[Prepared]]:
        """In the windows of a capture, which are bounded by what the teacher will say."""
        weigh = weigher(wants_of(self.fields.values()), self.teacher, self.preparer.config)
        for shard in range(len(self.plan.slices)):
            source = open_source(self.plan.spec(self.plan.slices[shard].part))
            for window in read_ahead(prepare_windows(job, shard, source, self.preparer, weigh=weigh)):
                for indices in token_batches(window.prepared, job.batch_tokens):
                    yield [window.prepared[i] for i in indices]

    def job(self, workers: int) -> CaptureJob:
        shutil.rmtree(self.folder, ignore_errors=True)
        storage = Storage(str(self.folder))
        write_plan(storage, self.plan)
        tokens = CaptureSettings().batch_tokens
        return CaptureJob(
            storage,
            self.plan,
            dict.fromkeys(self.fields, HASH),
            self.fields,
            batch_tokens=tokens,
            encode_workers=workers,
        )

    def bare(self) -> dict[str, float]:
        job = self.job(1)

        def run() -> None:
            for prepared in self.batches(job):
                self.teacher(prepared, frozenset())

        return self._clocked(run)

    def capture(self, workers: int) -> dict[str, float]:
        """Wall and CPU seconds of the whole line, and those that its threads spent in encoding rows; planning is not in it."""
        job, waits = self.job(workers), Waits()

        def run() -> None:
            for shard in range(len(self.plan.slices)):
                source = open_source(self.plan.spec(self.plan.slices[shard].part))
                cache_shard(job, shard, job.columns(shard), source, self.preparer, self.teacher, waits=waits)

        with encoding_watched() as spent:
            found = self._clocked(run)
        return {**found, "encoding": sum(spent), "waited": waits.encoded, "waited for writing": waits.written}

    def _clocked(self, run: Callable[[], None]) -> dict[str, float]:
        self.teacher.launches = []
        wall, cpu = perf_counter(), process_time()
        run()
        found = {"wall": perf_counter() - wall, "CPU": process_time() - cpu}
        return {**found, "launching": statistics.median(self.teacher.launches)}


@contextmanager
def encoding_watched() -> Iterator[list[float]]:
    """CPU seconds of every row's encoding."""
    spent, lock, encode = list[float](), threading.Lock(), line.encode_row

    def watched(*arguments: Any) -> Any:
        began = thread_time()
        found = encode(*arguments)
        with lock:
            spent.append(thread_time() - began)
        return found

    with mock.patch.object(line, "encode_row", watched):
        yield spent


def make_bench(options: Any, folder: Path) -> Bench:
    processor = real_shapes.processor()
    config = real_shapes.config("7B", processor.tokenizer)
    data = (
        DataSpec("sft", str(real_shapes.write_rows(folder / "world", options.rows)), image_root=str(folder / "world")),
    )
    preparer = Preparer(processor, config)
    plan = make_plan(data, options.shards, preparer.fingerprint(), 0, image_tokens=config.image_seq_length)
    job = CaptureJob(Storage(str(folder)), plan, {}, {})
    counts = {
        (len(one.vision_positions), len(one.response_rows))
        for shard in range(len(plan.slices))
        for window in prepare_windows(job, shard, open_source(plan.spec("sft")), preparer)
        for one in window.prepared
    }
    answers = Answers.drawn(options.width, max(one for one, _ in counts), max(one for _, one in counts))
    fields: dict[str, Any] = {}
    for kind in ("response", "vision"):
        topk: Any = create_field(f"{kind}_topk", {"k": K})
        fitted = topk.fit([TeacherOutput(topk={kind: heads(4096, 6)})], torch.zeros(VOCABULARY, 1))
        fields[f"{kind}_topk"] = topk.with_calibration(fitted.tensors)
        fields[f"{kind}_hidden"] = HostPart(answers, kind, [kind])
    fields["affinity"] = HostPart(answers, "affinity", ["vision", "text"])
    for vision, response in counts:
        answers.prepare(vision, response)
    return Bench(plan, preparer, Teacher(answers, options.ms_per_row), fields, folder / "cache")


def on_the_host(width: int, vision: int, response: int) -> float:
    """CPU milliseconds of one thread to encode a row where the teacher has no device of its own: coded fields, device's part and all."""
    grid = GRID if vision == GRID.height * GRID.width else Grid(0, 1, vision, vision)
    spent = 0.0
    for name, rows, grids in (
        ("vision", vision, (grid,)),
        ("response", response, ()),
        ("affinity", vision + response, (grid,)),
    ):
        one = Kind(name, width, rows, grids, 1.0)
        del one.coder.__dict__["_ordered"]
        states = torch.from_numpy(draw(rows, scales(width, name == "affinity"), 2)).to(torch.bfloat16)
        with one_thread():
            for _ in range(2):  # the first finds the order
                began = thread_time()
                one.coder.record(one.coder.quantise(states, grids), grids)
                last = thread_time() - began
        spent += last
    return 1e3 * spent


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--rows", type=int, default=384)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--ms-per-row", type=float, default=36.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args(arguments)
    described = machine("cpu")
    with tempfile.TemporaryDirectory() as folder:
        bench = make_bench(options, Path(folder))
        variants: dict[str, Callable[[], dict[str, float]]] = {"bare": bench.bare}
        variants |= {f"{workers} workers": partial(bench.capture, workers) for workers in options.workers}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
        for _ in range(options.repeats):
            for name, run in variants.items():
                found[name].append(run())
        rows = sum(one.rows for one in bench.plan.slices)
        counts = bench.teacher._answers.states
        host = on_the_host(options.width, len(counts["vision"]), len(counts["response"]))
    body = {
        "machine": described,
        "shapes": f"{options.width} null {options.ms_per_row:g} ms",
        "rows": rows,
        "shards": len(bench.plan.slices),
        "tokens": {name: len(one) for name, one in counts.items()},
        "repeats": options.repeats,
        "target": {"ratio to bare": TARGET, "cores of encoding": MOST_CORES},
        **{name: summary(each, found["bare"], rows) for name, each in found.items()},
        "encoding on the host, coded fields, CPU ms a row": round(host, 1),
    }
    names = list(variants)
    keys = list(body[names[-1]])
    print_table(("", *names), [(key, *(_middle(body[name].get(key, "")) for name in names)) for key in keys])
    finish("encode_workers", body, options.save)


def _middle(value: Any) -> str:
    return f"{value[1]:.3g}" if isinstance(value, list) else str(value)


def summary(each: Sequence[Mapping[str, float]], bare: Sequence[Mapping[str, float]], rows: int) -> dict[str, Any]:
    """Spreads; ratios are medians of those inside each repeat."""
    wall = [one["wall"] for one in each]
    body: dict[str, Any] = {
        "ratio to bare": round(median_ratio([one["wall"] for one in bare], wall), 4),
        "ms a row": spread([1e3 * one / rows for one in wall]),
        "CPU ms a row": spread([1e3 * one["CPU"] / rows for one in each]),
        "launching, ms a batch": spread([1e3 * one["launching"] for one in each]),
    }
    if "encoding" in each[0]:
        body["encoding, CPU ms a row"] = spread([1e3 * one["encoding"] / rows for one in each])
        body["cores that encode"] = spread([one["encoding"] / one["wall"] for one in each])
        body["waited for encoding"] = spread([one["waited"] / one["wall"] for one in each])
        body["waited for writing"] = spread([one["waited for writing"] / one["wall"] for one in each])
    return body


if __name__ == "__main__":
    main()
