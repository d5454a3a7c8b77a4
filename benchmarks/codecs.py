"""How few bytes hold a teacher's distribution, and at what fidelity? Our fields beside what others store.

    python -m benchmarks.codecs [--save]
    python -m benchmarks.codecs --only-text [--text-model runs/smollm2] [--save]

On the shipped demo teacher, vision and response rows apart (the shipped student, not yet distilled, supplies the gradients); with
``--only-text`` on a released language model instead, which reads documentation of what is installed (its early exit is the student). Every
one of our rows goes through the real field: fitted on other samples, encoded, packed as a tar member, unpacked, decoded.

Columns: payload bytes a row (and with the member's container); KL(p‖p̂) in nats, at temperature 1 and 4; angle in degrees of the forward-
and reverse-KL gradient of the student's head, summed over all test rows, against the dense teacher; median and 95th percentile of the
angles row by row.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.codec_measures import Fixed, Yardstick
from benchmarks.codec_rows import Rows, demo_rows, text_rows
from benchmarks.codec_targets import RECOMMENDED_NAME, RELEASED, SMALL, Targets, judge
from benchmarks.codec_vision import long_answers, vision_terms
from benchmarks.common import argument_parser, finish, machine, print_table
from benchmarks.published import BUDGET, RECOMMENDED, sampled_bytes, sampled_probs
from student_train.distributions import DenseTeacher, Distribution, HeadAndSketch, HeadAndTail, SketchTeacher
from teacher_cache.codecs import container, spectrum
from teacher_cache.codecs.transform import Transform
from teacher_cache.fields import create_field
from teacher_cache.fields.grids import grids_of_all
from teacher_cache.models.low_rank import LowRankHead
from teacher_cache.signal_records import Sketch, TopK

STEPS = (0.4, 0.2, 0.1, 0.04, 0.02, 0.01)
DRAWS = 50
SAMPLING = f"random sampling N={DRAWS}"
TEXT_CALIBRATION, TEXT_TEST = 63, 12
"""Pieces of 256 tokens."""
Params = dict[str, dict[str, Any]]


def configurations() -> dict[str, Params]:
    """Name → suffix of the field → its parameters."""
    return {
        **others_than_standard(),
        **{f"sketch Δ={step}": {"hidden": sketch(step)} for step in (0.1, 0.02)},
        **{f"top-{k} + sketch Δ=0.1": {"topk": {"k": k}, "hidden": sketch(0.1)} for k in (4, 16)},
        **{f"top-8 + sketch Δ={step}": {"topk": {"k": 8}, "hidden": sketch(step)} for step in STEPS},
    }


def others_than_standard() -> dict[str, Params]:
    return {
        **{f"top-{k}": {"topk": {"k": k}} for k in (12, 50, 128)},
        **{f"hidden {codec}": {"hidden": {"codec": codec}} for codec in ("bf16", "int8", "int4")},
    }


def sketch(step: float) -> dict[str, Any]:
    return {"codec": "sketch", "step": step}


RELEASED_STEPS = (0.2, 0.1, 0.06, 0.04, 0.02)
RELEASED_AT_BYTES = (0.21, 0.066, 0.045)
RELEASED_HEADS = ((4, 0.1), (16, 0.1))
COARSE_HEAD = 1 / 16
"""Nats: of head values beside a sketch that is coarser still."""


def released_configurations() -> dict[str, Params]:
    """Of a released model: the steps that its targets are about, and heads of other sizes and steps beside them."""
    coarse = {"k": 8, "step": COARSE_HEAD}
    return {
        **others_than_standard(),
        **{f"sketch Δ={step}": {"hidden": sketch(step)} for step in (0.1, 0.03)},
        **{f"top-8 + sketch Δ={step}": {"topk": {"k": 8}, "hidden": sketch(step)} for step in RELEASED_STEPS},
        **{f"top-8 in 1/16 + sketch Δ={step}": {"topk": coarse, "hidden": sketch(step)} for step in RELEASED_AT_BYTES},
        **{f"top-{k} + sketch Δ={step}": {"topk": {"k": k}, "hidden": sketch(step)} for k, step in RELEASED_HEADS},
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
                    low_rank = fitted.low_rank_head
                    made = LowRankHead(low_rank["weight"], low_rank["bias"], field.params["step"])
                    self.low_rank = made.to(torch.device("cpu"))
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
        return SketchTeacher(sketch, self.low_rank) if topk is None else HeadAndSketch.of(topk, sketch, self.low_rank)


def our_rows(rows: Rows, yardstick: Yardstick, chosen: dict[str, Params]) -> dict[str, dict[str, float]]:
    results = {}
    for name, params in chosen.items():
        coded = Coded(rows, params)
        distribution: Any = coded.distribution(rows.head)
        body = yardstick.measure(lambda chunk, truth, all_rows=distribution: all_rows[chunk])
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


def others(rows: Rows, yardstick: Yardstick) -> dict[str, dict[str, float]]:
    """The published codings on the same rows."""
    topk = TopK.join([one.topk[rows.kind] for one in rows.test])
    vocabulary = len(rows.head)
    results = {}
    for name, one in ((RECOMMENDED_NAME, RECOMMENDED), ("DistillKit budget", BUDGET)):
        if one.k <= topk.ids.shape[1]:
            body = yardstick.measure(lambda chunk, truth, one=one: Fixed(one.log_probs(topk[chunk], vocabulary)))
            results[name] = {"bytes": one.bytes_per_row(vocabulary), **body}
    generator, unique = torch.Generator().manual_seed(0), []

    def draw(chunk: slice, truth: torch.Tensor) -> Fixed:
        estimate, kept = sampled_probs(truth, DRAWS, generator)
        unique.append(kept)
        return Fixed(estimate.log())

    body = yardstick.measure(draw) | dict.fromkeys(("kl", "kl_p95", "soft_kl"), math.inf)
    size = sampled_bytes(float(np.mean(unique)), vocabulary, DRAWS)
    return {**results, SAMPLING: {"bytes": size, "unique": float(np.mean(unique)), **body}}


def report(rows: Rows, results: dict[str, dict[str, float]]) -> None:
    names = (
        "forward_angle",
        "forward_row_median",
        "forward_row_p95",
        "reverse_angle",
        "reverse_row_median",
        "reverse_row_p95",
    )
    header = [
        "",
        "B/row",
        "+container",
        "KL nats",
        "KL T=4",
        "fwd°",
        "fwd med°",
        "fwd p95°",
        "rev°",
        "rev med°",
        "rev p95°",
    ]
    lines = []
    for name, one in sorted(results.items(), key=lambda item: item[1]["bytes"]):
        angles = [f"{one[key]:.2f}" if key in one else "–" for key in names]
        container_bytes = f"{one['with_container']:.1f}" if "with_container" in one else "–"
        lines.append(
            [name, f"{one['bytes']:.1f}", container_bytes, f"{one['kl']:.5f}", f"{one['soft_kl']:.5f}", *angles]
        )
    print(f"\n{rows.name}: {len(rows.hidden)} test rows, {len(rows.calibration)} calibration samples")
    print_table(header, lines)


def run(rows: Rows, chosen: dict[str, Params], wanted: Targets) -> dict[str, Any]:
    yardstick = Yardstick(DenseTeacher(rows.hidden, rows.head), rows.student_hidden, rows.student_head)
    results = {**our_rows(rows, yardstick, chosen), **others(rows, yardstick)}
    report(rows, results)
    width, vocabulary = rows.head.shape[1], len(rows.head)
    return {
        "rows": len(rows.hidden),
        "calibration rows": sum(len(one.hidden[rows.kind]) for one in rows.calibration),
        "vocabulary": vocabulary,
        "width": width,
        "entropy": yardstick.entropy(),
        "mass of top-128 at temperature 4": yardstick.soft_mass(min(128, vocabulary)),
        "results": results,
        "targets": judge(results, wanted, vocabulary, width, SAMPLING),
    }


def on_demo(calibration: int, test: int) -> dict[str, Any]:
    body: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rows in demo_rows(Path(folder), calibration, test):
            body[rows.name] = run(rows, configurations(), SMALL)
            if rows.kind == "vision":
                body["vision terms"] = vision_terms(rows, Coded(rows, configurations()[STANDARD]))
                body["affinities of long records"] = long_answers(rows)
    return body


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument(
        "--text-model", type=Path, default=Path("runs/smollm2"), help="`make real-text-teacher` writes it"
    )
    parser.add_argument("--calibration", type=int, default=256, help="demo samples that fit the fields")
    parser.add_argument("--test", type=int, default=128, help="demo samples measured")
    parser.add_argument("--only-text", action="store_true", help="the language model in place of the demo teacher")
    options = parser.parse_args()
    if options.only_text and not options.text_model.is_dir():
        parser.error(f"no folder {options.text_model}: `make real-text-teacher` makes runs/smollm2")
    body: dict[str, Any] = {"machine": machine("cpu"), "shapes": "text" if options.only_text else options.shapes}
    if options.only_text:
        rows = text_rows(options.text_model, TEXT_CALIBRATION, TEXT_TEST)
        body[rows.name] = run(rows, released_configurations(), RELEASED)
    else:
        body |= on_demo(options.calibration, options.test)
    print(json.dumps({name: one["targets"] for name, one in body.items() if "targets" in one}, indent=1))
    finish("codecs", body, options.save)


if __name__ == "__main__":
    main()
