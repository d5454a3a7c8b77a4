"""What do the coded fields of ``standard`` cost a host at the width of a 7B teacher? Version 1 of the sketch beside version 2.

    python -m benchmarks.codec_speed [--width 3584] [--save]

One row of a mixture: a grid of 27 × 27 vision tokens and 200 response tokens, heads of 8 out of 152,064. No teacher of that width is at
hand: coefficients are drawn (Laplace, rows independent, which is the dear case) with the standard deviations that those of SmolLM2-135M's
response rows have (``smollm2_spectrum.npz``: of a sketch, and of unit states), drawn out from 576 dimensions to the width at the same
energy a row. Tables are fitted on other rows of the same distribution; in the lines "other rows" the record's rows are half as loud.

Host alone, on one thread, in CPU milliseconds of that thread (medians of interleaved repeats): encoding without what runs where the teacher
is (product, cosine transform, quantising, ordering), decoding without what runs where the student is trained (numbers of symbols, inverse
transform, products). Version 1 restored on the host. The second table: bytes a row of records of few rows, by coder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import thread_time
from typing import Any

import numpy as np
import torch

from benchmarks.coding_cost import one_thread
from benchmarks.common import argument_parser, finish, machine, median_ratio, print_table, spread
from teacher_cache.codecs import adaptive, container, entropy, fitting, spectrum, transform
from teacher_cache.codecs.entropy_tables import fit_smooth_table
from teacher_cache.codecs.spectrum import Grid
from teacher_cache.fields import create_field, decode_record
from teacher_cache.fields.affinity import VISION_ROWS
from teacher_cache.fields.calibration import tensors_of
from teacher_cache.records import TeacherOutput
from teacher_cache.signal_records import TopK

SPECTRUM = Path(__file__).parent / "smollm2_spectrum.npz"
VOCABULARY, K = 152_064, 8
STEPS = {"vision": 0.02, "response": 0.04, "affinity": 0.02}
"""Of the profile ``standard``."""
TARGETS = {"decode": 12.0, "encode": 60.0}
SMALL = (8, 16, 32, 64, 200, 729)


def scales(width: int, unit: bool) -> np.ndarray:
    """float64 ``[D]``: standard deviations of a sketch's coefficients; ``unit``: of unit vectors."""
    each = np.load(SPECTRUM)["unit_std" if unit else "std"].astype(np.float64)
    wide = np.interp(np.linspace(0, 1, width), np.linspace(0, 1, len(each)), each)
    return wide * np.sqrt((each**2).sum() / (wide**2).sum())


def draw(rows: int, each: np.ndarray, seed: int) -> np.ndarray:
    """float32 ``[R, D]``."""
    rng = np.random.default_rng(seed)
    return (rng.laplace(scale=2**-0.5, size=(rows, len(each))) * each).astype(np.float32)


class Kind:
    """Rows of one kind: a coder whose basis is the coefficients' own, so that what is timed is coding alone."""

    def __init__(self, name: str, width: int, rows: int, grids: tuple[Grid, ...], loud: float):
        self.name, self.grids, step = name, grids, STEPS[name]
        each = scales(width, name == "affinity")
        seen = draw(max(2 * rows, 512), each, 1) / step
        rank = int(np.flatnonzero((np.abs(seen) > 0.5).mean(axis=0) > fitting.LEAST_USED).max()) + 1
        # Independent rows have the same spectrum in every band.
        bands = np.arange(len(seen)) % spectrum.BANDS
        eye = torch.eye(width)[:, :rank].contiguous()
        self.coder = fitting.with_tables(torch.zeros(width), eye, step, seen[:, :rank], bands)
        values = spectrum.forward(torch.from_numpy(draw(rows, each, 2)[:, :rank] * loud), grids)
        self.symbols = (values / step).round().to(torch.int16)
        self.means = np.random.default_rng(3).integers(-300, 300, rows)
        self.table = fit_smooth_table(self.means)
        # What runs where the teacher is.
        ordered = self.coder._ordered(self.symbols, grids)
        self.coder.__dict__["_ordered"] = lambda symbols, grids: ordered

    def encode(self, version: int) -> dict[str, torch.Tensor]:
        """The host's part of one record."""
        return self.encoded(self.symbols, version)

    def encoded(self, symbols: torch.Tensor, version: int = 2) -> dict[str, torch.Tensor]:
        """Of the first so many rows."""
        if self.name == "affinity":
            before = [(np.array([len(symbols)]), VISION_ROWS)]
            return self.coder.record(symbols, self.grids, before, version)
        return self.coder.record(symbols, self.grids, [(self.means[: len(symbols)], self.table)], version)

    def field(self, version: int) -> Any:
        params = {"codec": "sketch", "codec_version": version, "step": STEPS[self.name]}
        more = {**tensors_of({"mean_logit": self.table}), "mean_weight": torch.zeros(len(self.coder.mean))}
        return create_field(f"{self.name}_hidden", params, {**self.coder.tensors(), **more})


def heads(rows: int, seed: int) -> TopK:
    """Of peaked distributions: neighbours share most of their likeliest tokens."""
    rng = np.random.default_rng(seed)
    pool = rng.integers(0, VOCABULARY, (1 + rows // 8, 3 * K))
    ids = np.stack([rng.choice(pool[row // 8], K, replace=False) for row in range(rows)])
    logits = -np.sort(-rng.gumbel(size=(rows, K)) * 2, axis=1)
    log_tail = torch.from_numpy(rng.uniform(-4, -0.5, rows)).float()
    log_probs = torch.log_softmax(torch.from_numpy(logits).float(), dim=1) + torch.log1p(-log_tail.exp())[:, None]
    return TopK(torch.from_numpy(ids), log_probs, log_tail, torch.from_numpy(rng.normal(20, 2, rows)).float())


def seconds(run: Callable[[], Any]) -> float:
    began = thread_time()
    run()
    return thread_time() - began


def measure(width: int, side: int, response: int, loud: float, repeats: int) -> dict[str, Any]:
    """Milliseconds a row of both versions: spreads by part, sums, and the ratio of the sums inside each repeat."""
    vision = side * side
    grid = (Grid(0, side, side, side),)
    kinds = [Kind("vision", width, vision, grid, loud), Kind("response", width, response, (), loud)]
    affinity = Kind("affinity", width, vision + response, grid, 1.0)
    outputs = {one.name: heads(len(one.symbols), 5) for one in kinds}
    topk: dict[str, Any] = {}
    for name in outputs:
        field: Any = create_field(f"{name}_topk", {"k": K})
        fitted = field.fit([TeacherOutput(topk={name: heads(4096, 6)})], torch.zeros(VOCABULARY, 1))
        topk[name] = field.with_calibration(fitted.tensors)

    def encoded_heads() -> dict[str, bytes]:
        return {
            name: container.pack(one.encode(None, TeacherOutput(topk={name: outputs[name]})))
            for name, one in topk.items()
        }

    stored_heads = encoded_heads()
    records = {(one.name, v): container.pack(one.encode(v)) for one in (*kinds, affinity) for v in (1, 2)}
    fields = {(one.name, v): one.field(v) for one in kinds for v in (1, 2)}
    runs: dict[str, Callable[[], Any]] = {
        "decode heads": lambda: [decode_record(topk[n], stored_heads[n], "here") for n in topk]
    }
    for one in kinds:
        for version in (1, 2):
            field, data = fields[one.name, version], records[one.name, version]
            runs[f"decode {one.name} {version}"] = partial(decode_record, field, data, "here", version > 1)
    runs["encode heads"] = encoded_heads
    for one in (*kinds, affinity):
        for version in (1, 2):
            runs[f"encode {one.name} {version}"] = partial(packed, one, version)
    with one_thread():
        for run in runs.values():
            run()
        took: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                took[name].append(1e3 * seconds(run))
    return summary(took, records, vision, response)


def packed(one: Kind, version: int) -> bytes:
    return container.pack(one.encode(version))


def summary(
    took: Mapping[str, list[float]], records: Mapping[tuple[str, int], bytes], vision: int, response: int
) -> dict[str, Any]:
    rows = {"vision": vision, "response": response, "affinity": vision + response}
    body: dict[str, Any] = {"parts": {name: spread(each) for name, each in took.items()}}
    for what in TARGETS:
        sums = {
            version: [
                sum(each)
                for each in zip(*(took[n] for n in took if n.startswith(what) and n.split()[-1] in ("heads", version)))
            ]
            for version in ("1", "2")
        }
        body[what] = {
            "version 1": spread(sums["1"]),
            "version 2": spread(sums["2"]),
            "ratio": round(median_ratio(sums["1"], sums["2"]), 2),
            "target": TARGETS[what],
        }
    body["bytes a row"] = {f"{name} {version}": len(data) / rows[name] for (name, version), data in records.items()}
    return body


def small_records(width: int, count: Sequence[int]) -> list[dict[str, float]]:
    """Bytes a row of response records, by coder: under calibrated tables, adaptive, and what is stored."""
    found = []
    for rows in count:
        one = Kind("response", width, rows, (), 1.0)
        order, ordered = one.coder._ordered(one.symbols, ())
        tabled = len(entropy.encode(one.coder.streams(one.symbols), rows))
        own = len(adaptive.encode(ordered, order.counts)) + transform.MEMBER_BYTES
        kept = sum(map(len, one.coder.record(one.symbols, (), version=2).values()))
        found.append(
            {
                "rows": rows,
                "symbols": len(ordered),
                "tables": tabled / rows,
                "adaptive": own / rows,
                "stored": kept / rows,
            }
        )
    return found


def report(body: Mapping[str, Any]) -> None:
    for name in ("rows as calibrated", "other rows"):
        one = body[name]
        print(f"\n{name}")
        parts = [(part, f"{each[1]:.1f}", f"{each[0]:.1f} – {each[2]:.1f}") for part, each in one["parts"].items()]
        for what in TARGETS:
            for version in ("version 1", "version 2"):
                each = one[what][version]
                parts.append((f"{what}, all, {version}", f"{each[1]:.1f}", f"{each[0]:.1f} – {each[2]:.1f}"))
        print_table(("", "ms a row", "from – to"), parts)
        print(", ".join(f"{key} {value:.0f} B" for key, value in one["bytes a row"].items()))
    print()
    lines = [
        [f"{value:.1f}" if isinstance(value, float) else value for value in one.values()]
        for one in body["small records"]
    ]
    print_table(list(body["small records"][0]), lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--side", type=int, default=27, help="of the grid of vision tokens")
    parser.add_argument("--response", type=int, default=200)
    parser.add_argument("--small-width", type=int, default=576, help="of the records of few rows")
    options = parser.parse_args(arguments)
    body: dict[str, Any] = {"machine": machine("cpu"), "shapes": str(options.width)}
    body |= {"width": options.width, "rows": [options.side**2, options.response], "vocabulary": VOCABULARY}
    for name, loud in (("rows as calibrated", 1.0), ("other rows", 0.5)):
        body[name] = measure(options.width, options.side, options.response, loud, options.repeats)
    body["small records"] = small_records(options.small_width, SMALL)
    report(body)
    finish("codec_speed", body, options.save)


if __name__ == "__main__":
    main()
