"""How few bytes hold a teacher's distribution, and at what fidelity? Our fields beside what others store.

    python -m benchmarks.codecs [--text-model runs/text_teacher/model] [--save]

On the shipped demo teacher, vision and response rows apart (the shipped student, not yet distilled, supplies the gradients), and on
the larger language model of ``benchmarks.text_teacher`` where its folder is there (its early exit is the student). Every one of our
rows goes through the real field: fitted on other samples, encoded, packed as a tar member, unpacked, decoded.

Columns: payload bytes a row (and with the member's container); KL(p‖p̂) in nats; angle in degrees of the forward- and reverse-KL gradient
of the student's head, summed over all test rows, against the dense teacher; median and 95th percentile of the angles row by row.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.codec_measures import Fixed, measure
from benchmarks.codec_rows import Rows, demo_rows, text_rows
from benchmarks.codec_vision import vision_terms
from benchmarks.common import argument_parser, finish, machine, print_table
from benchmarks.published import BUDGET, RECOMMENDED, sampled_bytes, sampled_probs
from student_train.distributions import DenseTeacher, Distribution, HeadAndSketch, HeadAndTail, SketchTeacher
from teacher_cache.codecs import container, spectrum
from teacher_cache.codecs.transform import Transform
from teacher_cache.fields import create_field
from teacher_cache.fields.grids import grids_of_all
from teacher_cache.records import Sketch, TopK
from teacher_cache.teachers.low_rank import LowRankHead

STEPS = (0.4, 0.2, 0.1, 0.04, 0.02, 0.01)
DRAWS = 50
TEXT_CALIBRATION, TEXT_TEST = 48, 12
"""Blocks of 256 tokens."""
Params = dict[str, dict[str, Any]]


def configurations() -> dict[str, Params]:
    """Name → suffix of the field → its parameters."""
    sketch = {step: {"codec": "sketch", "step": step} for step in STEPS}
    return {
        **{f"top-{k}": {"topk": {"k": k}} for k in (12, 50, 128)},
        "top-50, plain": {"topk": {"k": 50, "coding": "plain"}},
        **{f"hidden {codec}": {"hidden": {"codec": codec}} for codec in ("bf16", "int8", "int4")},
        **{f"sketch Δ={step}": {"hidden": sketch[step]} for step in (0.1, 0.02)},
        **{f"top-{k} + sketch Δ=0.1": {"topk": {"k": k}, "hidden": sketch[0.1]} for k in (4, 16)},
        **{f"top-8 + sketch Δ={step}": {"topk": {"k": 8}, "hidden": one} for step, one in sketch.items()},
    }


STANDARD = "top-8 + sketch Δ=0.02"
"""Vision rows of the ``standard`` profile."""


class Coded:
    """Fields fitted on the calibration samples, and what a reader gets of the test samples."""

    def __init__(self, rows: Rows, params: Params):
        self.payload = self.stored = 0
        self.records: dict[str, Any] = {}
        self.fields: dict[str, Any] = {}
        self.low_rank: LowRankHead | None = None
        for suffix, given in params.items():
            field: Any = create_field(f"{rows.kind}_{suffix}", given)
            if field.calibrated:
                fitted = field.fit(rows.calibration, rows.head)
                field = field.with_calibration(fitted.tensors)
                if fitted.low_rank_head:
                    low_rank = LowRankHead(fitted.low_rank_head["weight"], fitted.low_rank_head["bias"])
                    self.low_rank = low_rank.to(torch.device("cpu"))
            self.fields[suffix] = field
            self.records[suffix] = [self._through(field, one, said) for one, said in zip(rows.prepared, rows.test)]
        self.count = len(rows.hidden)

    def _through(self, field: Any, prepared: Any, said: Any) -> Any:
        stored = field.encode(prepared, said)
        self.payload += sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
        data = container.pack(stored)
        self.stored += len(data)
        return field.decode(container.unpack(data))

    def distribution(self, head: torch.Tensor) -> Distribution:
        topk = TopK.join(self.records["topk"]) if "topk" in self.records else None
        if "hidden" not in self.records:
            assert topk is not None
            return HeadAndTail(topk, len(head))
        hidden = self.records["hidden"]
        if self.low_rank is None:
            return DenseTeacher(torch.cat(hidden), head)
        sketch = Sketch.join(hidden)
        return SketchTeacher(sketch, self.low_rank) if topk is None else HeadAndSketch(topk, sketch, self.low_rank)


def our_rows(rows: Rows, live: DenseTeacher) -> dict[str, dict[str, float]]:
    results = {}
    for name, params in configurations().items():
        coded = Coded(rows, params)
        body = measure(live, coded.distribution(rows.head), rows.student_hidden, rows.student_head)
        size = {"bytes": coded.payload / coded.count, "with_container": coded.stored / coded.count}
        results[name] = {**size, **body, **(rate(rows, coded) if coded.low_rank is not None else {})}
        print(f"  {name}: {size['bytes']:.1f} B, KL {body['kl']:.5f}", flush=True)
    return results


def rate(rows: Rows, coded: Coded) -> dict[str, float]:
    """Bytes of a sketch's symbols as they are coded, over their empirical entropy: each dimension of each band a source of its own."""
    coder: Transform = coded.fields["hidden"]._fitted[0]
    grids = grids_of_all(rows.test, rows.kind, [len(one.hidden[rows.kind]) for one in rows.test])
    symbols, bands = coder.quantise(rows.hidden, grids), spectrum.bands(len(rows.hidden), grids)
    entropy = sum(
        _entropy(symbols[bands == band, dim].numpy()) * (bands == band).mean()
        for band in np.unique(bands)
        for dim in range(coder.rank)
    )
    bits = sum(table.bits(one.reshape(-1)) for one, table in coder.streams(symbols, grids)[2:])
    size = bits / 8 / len(symbols)
    return {
        "rank": coder.rank,
        "symbol_bytes": size,
        "entropy_bytes": entropy / 8,
        "rate_over_entropy": 8 * size / entropy,
    }


def _entropy(symbols: np.ndarray) -> float:
    share = np.unique(symbols, return_counts=True)[1] / len(symbols)
    return float(-(share * np.log2(share)).sum())


def others(rows: Rows, live: DenseTeacher) -> dict[str, dict[str, float]]:
    """The published codings on the same rows."""
    topk = TopK.join([one.topk[rows.kind] for one in rows.test])
    vocabulary = len(rows.head)
    results = {}
    for name, one in (("DistillKit recommended", RECOMMENDED), ("DistillKit budget", BUDGET)):
        if one.k <= topk.ids.shape[1]:
            body = measure(
                live,
                None,
                rows.student_hidden,
                rows.student_head,
                make=lambda chunk, truth, one=one: Fixed(one.log_probs(topk[chunk], vocabulary)),
            )
            results[name] = {"bytes": one.bytes_per_row(vocabulary), **body}
    generator, unique = torch.Generator().manual_seed(0), []

    def draw(chunk: slice, truth: torch.Tensor) -> Fixed:
        estimate, kept = sampled_probs(truth, DRAWS, generator)
        unique.append(kept)
        return Fixed(estimate.log())

    body = measure(live, None, rows.student_hidden, rows.student_head, make=draw)
    body |= {"kl": math.inf, "kl_p95": math.inf}
    results[f"random sampling N={DRAWS}"] = {
        "bytes": sampled_bytes(float(np.mean(unique)), vocabulary, DRAWS),
        "unique": float(np.mean(unique)),
        **body,
    }
    return results


def report(rows: Rows, results: dict[str, dict[str, float]]) -> None:
    names = (
        "forward_angle",
        "forward_row_median",
        "forward_row_p95",
        "reverse_angle",
        "reverse_row_median",
        "reverse_row_p95",
    )
    header = ["", "B/row", "+container", "KL nats", "fwd°", "fwd med°", "fwd p95°", "rev°", "rev med°", "rev p95°"]
    lines = []
    for name, one in sorted(results.items(), key=lambda item: item[1]["bytes"]):
        angles = [f"{one[key]:.2f}" if key in one else "–" for key in names]
        container_bytes = f"{one['with_container']:.1f}" if "with_container" in one else "–"
        lines.append([name, f"{one['bytes']:.1f}", container_bytes, f"{one['kl']:.5f}", *angles])
    print(f"\n{rows.name}: {len(rows.hidden)} test rows, {len(rows.calibration)} calibration samples")
    print_table(header, lines)


def targets(rows: Rows, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The targets, each with the best configuration that meets it, or what is nearest."""
    width, vocabulary = rows.head.shape[1], len(rows.head)
    ours = {name: one for name, one in results.items() if "with_container" in one}
    small = [one for n, one in ours.items() if "+ sketch" in n and one["bytes"] <= 2 * width / 10]
    recommended = results.get("DistillKit recommended", {"kl": math.nan})
    half = [one for one in ours.values() if one["bytes"] <= RECOMMENDED.bytes_per_row(vocabulary) / 2]
    least = [one for n, one in ours.items() if "+ sketch" in n and one["bytes"] <= 36]
    sampling = results[f"random sampling N={DRAWS}"]["forward_angle"]
    return {
        "tenth_of_bf16": {
            "bytes_allowed": 2 * width / 10,
            "met": any(o["kl"] <= 0.005 and o["forward_angle"] <= 1 and o["reverse_angle"] <= 1 for o in small),
            "best_kl": min((o["kl"] for o in small), default=None),
        },
        "half_of_distillkit": {
            "bytes_allowed": RECOMMENDED.bytes_per_row(vocabulary) / 2,
            "kl_ratio": recommended["kl"] / min(o["kl"] for o in half) if half else None,
        },
        "at_36_bytes": {
            "met": any(o["forward_angle"] < sampling and o["reverse_angle"] <= 5 for o in least),
            "forward_angle": min((o["forward_angle"] for o in least), default=None),
            "reverse_angle": min((o["reverse_angle"] for o in least), default=None),
            "random_sampling_forward_angle": sampling,
        },
        "rate_over_entropy": max(one.get("rate_over_entropy", 0.0) for one in ours.values()),
    }


def run(rows: Rows) -> dict[str, Any]:
    live = DenseTeacher(rows.hidden, rows.head)
    results = {**our_rows(rows, live), **others(rows, live)}
    report(rows, results)
    body = {"rows": len(rows.hidden), "vocabulary": len(rows.head), "width": rows.head.shape[1]}
    return {**body, "results": results, "targets": targets(rows, results)}


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--text-model", type=Path, default=Path("runs/text_teacher/model"))
    parser.add_argument("--calibration", type=int, default=256, help="demo samples that fit the fields")
    parser.add_argument("--test", type=int, default=128, help="demo samples measured")
    options = parser.parse_args()
    body: dict[str, Any] = {"machine": machine("cpu"), "shapes": options.shapes}
    with tempfile.TemporaryDirectory() as folder:
        for rows in demo_rows(Path(folder), options.calibration, options.test):
            body[rows.name] = run(rows)
            if rows.kind == "vision":
                body["vision terms"] = vision_terms(rows, Coded(rows, configurations()[STANDARD]))
    if options.text_model.is_dir():
        rows = text_rows(options.text_model, TEXT_CALIBRATION, TEXT_TEST)
        body[rows.name] = run(rows)
    print(json.dumps({name: one["targets"] for name, one in body.items() if "targets" in one}, indent=1))
    finish("codecs", body, options.save)


if __name__ == "__main__":
    main()
