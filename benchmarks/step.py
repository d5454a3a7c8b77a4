"""What does one optimizer step of LLaVA-KD cost beside plain SFT, from a cache and with the teacher live?

Variants on the same rows, the demo student in stage SFT / DFT (projector and language model train, tower frozen):
``sft``; ``llava-kd exact`` (bfloat16 hidden states from the cache, logits made from the teacher's head); ``llava-kd standard`` (top-8 and
sketched hidden states, the default); ``llava-kd live`` (the teacher's forward inside the step, the same losses); ``llava-kd compact``
(top-50 fields and the relation matrix).

    python -m benchmarks.step [--repeats 5] [--save]
    python -m benchmarks.step --device cuda --shapes real --batch 4

Two clocks: the trainer's step alone on batches in memory, and the whole loop with loading (read, decode, tokenize, images)
in the same process. Floating-point operations are counted by ``torch.utils.flop_counter`` over the actual step; peak memory
comes from a process of its own for each variant, on a GPU from its allocator. Decoding a batch (read, unpack, decode; one
thread) is timed beside the steps.
Targets: exact / sft at most 1.15 × the ratio of operations; live at least 2 × exact; decoding at most 10 % of the student's step.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch

from benchmarks import memory
from benchmarks.common import argument_parser, finish, interleave, machine, median_ratio, print_table, spread, timed
from benchmarks.step_variants import (
    CACHED,
    EXACT,
    LIVE,
    SFT,
    STANDARD,
    VARIANTS,
    Variant,
    build_variant,
    write_caches,
)
from benchmarks.worlds import World, open_world

BATCH = {"demo": 16, "real": 4}
OVERHEAD_TARGET, LIVE_TARGET, DECODE_TARGET = 1.15, 2.0, 0.10


def parse(arguments: Sequence[str] | None) -> Any:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--batch", type=int, default=0, help="rows of a step; 0: 16 (demo), 4 (real)")
    parser.add_argument("--steps", type=int, default=4, help="steps timed in one repeat")
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    parser.add_argument(
        "--memory-of", choices=VARIANTS, help="internal: peak memory of one variant on an existing --cache"
    )
    parser.add_argument("--cache", help="internal: the cache of the parent process")
    options = parser.parse_args(arguments)
    options.batch = options.batch or BATCH[options.shapes]
    return options


def make_variant(name: str, options: Any, world: World, url: str) -> Variant:
    return build_variant(name, world, url, options.batch, options.workers, options.steps)


def peak_memory(options: Any) -> dict[str, float]:
    """MiB: before the first step, and at the peak over two steps."""
    with tempfile.TemporaryDirectory() as folder:
        variant = make_variant(options.memory_of, options, open_world(options, Path(folder), 8), options.cache)
        steps = variant.steps(2)
        before, peak, _ = memory.peak_memory(lambda: variant.run(steps), options.device)
        return {"before": round(before), "peak": round(peak)}


def memory_in_subprocess(name: str, options: Any, url: str) -> dict[str, float]:
    arguments = ["--memory-of", name, "--cache", url, "--device", options.device, "--shapes", options.shapes]
    arguments += ["--batch", str(options.batch), "--models", options.models]
    arguments += ["--layers", str(options.layers)] if options.layers else []
    return memory.in_subprocess("benchmarks.step", arguments)


def on_one_gpu(options: Any, world: World, url: str) -> tuple[dict[str, dict[str, float]], dict[str, Variant]]:
    """All variants, one built after the other, and MiB that each takes beside those before it: the allocator counts them exactly."""
    peaks, variants = {}, {}
    for name in VARIANTS:
        there = torch.cuda.memory_allocated()
        variant = variants[name] = make_variant(name, options, world, url)
        steps = variant.steps(2)
        before, peak, _ = memory.peak_memory(lambda v=variant, s=steps: v.run(s), options.device)
        peaks[name] = {"before": round(before - there / 2**20), "peak": round(peak - there / 2**20)}
    return peaks, variants


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.memory_of:
        print(json.dumps(peak_memory(options)))
        return
    described = machine(options.device)
    with tempfile.TemporaryDirectory() as folder:
        rows = options.batch * options.steps
        # A quarter of the demo's rows are captions, which no step here reads.
        world = open_world(options, Path(folder), rows * 4 // 3 + 4)
        url = str(Path(folder) / "cache")
        write_caches(world, url)
        if options.device.startswith("cuda"):
            peaks, variants = on_one_gpu(options, world, url)
        else:
            peaks = {name: memory_in_subprocess(name, options, url) for name in VARIANTS}
            variants = {name: make_variant(name, options, world, url) for name in VARIANTS}
        body = measure(options, world, variants)
    body = {"machine": described, "shapes": options.shapes, "models": world.describe(), **body, "memory_mib": peaks}
    report(body)
    finish("step", body, options.save)


def measure(options: Any, world: World, variants: dict[str, Variant]) -> dict[str, Any]:
    """Operations, a loss and seconds of every variant."""
    steps = {name: variant.steps(options.steps) for name, variant in variants.items()}
    losses = {name: variant.trainer.step(0, steps[name][0]).loss for name, variant in variants.items()}
    flops = {name: variant.flops(steps[name][0]) for name, variant in variants.items()}
    cpu: dict[str, list[float]] = {name: [] for name in variants}

    def run(name: str) -> float:
        began = process_time()
        wall = timed(lambda: variants[name].run(steps[name]), world.device)
        cpu[name].append(process_time() - began)
        return wall

    alone = {name: partial(run, name) for name in variants}
    loop = {n: lambda v=v: timed(lambda: v.run_with_loading(options.steps), world.device) for n, v in variants.items()}
    interleave(alone, 1)  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    decoding: dict[str, list[dict[str, float]]] = {name: [] for name in CACHED}
    for _ in range(options.repeats):
        for name, values in interleave(alone, 1).items():
            seconds[name] += values
        for name in CACHED:
            decoding[name].append(variants[name].decode(steps[name]))
    loaded = interleave(loop, options.repeats)
    count = options.steps
    return {
        "batch": options.batch,
        "steps_a_repeat": count,
        "repeats": options.repeats,
        "loader_processes": options.workers,
        "loss_of_a_step": {name: round(loss, 5) for name, loss in losses.items()},
        "gflop_a_step": {name: round(total / 1e9, 3) for name, total in flops.items()},
        "seconds_a_step": {name: [one / count for one in spread(values)] for name, values in seconds.items()},
        "seconds_a_step_with_loading": {
            name: [one / count for one in spread(values)] for name, values in loaded.items()
        },
        "decode": decode_costs(decoding, at_best(world.device, seconds, cpu), count),
        "ratios": ratios(seconds, loaded, flops),
        "targets": {
            "exact/sft over operations": OVERHEAD_TARGET,
            "live/exact": LIVE_TARGET,
            "decode/step": DECODE_TARGET,
        },
    }


def at_best(device: str, seconds: dict[str, list[float]], cpu: dict[str, list[float]]) -> dict[str, list[float]]:
    """What steps take where nothing disturbs them: on a CPU, their CPU seconds over their threads; a GPU's wall seconds as they are."""
    if device.startswith("cuda"):
        return seconds
    count = len(seconds[SFT])
    return {name: [one / torch.get_num_threads() for one in values[-count:]] for name, values in cpu.items()}


def decode_costs(
    decoding: dict[str, list[dict[str, float]]], steps: dict[str, list[float]], count: int
) -> dict[str, dict[str, float]]:
    """Medians: ms a batch (CPU of the one thread, and wall), and the CPU time's share of the variant's own step and of an SFT step."""
    table = {}
    for name, runs in decoding.items():
        cpu = [run["cpu"] for run in runs]
        table[name] = {
            "ms a batch": round(1e3 * median(cpu) / count, 3),
            "wall ms a batch": round(1e3 * median(run["wall"] for run in runs) / count, 3),
            "step at best, ms": round(1e3 * median(steps[name]) / count, 3),
            "of its own step": round(median_ratio(cpu, steps[name]), 4),
            "of an sft step": round(median_ratio(cpu, steps[SFT]), 4),
        }
    return table


def ratios(seconds: dict, loaded: dict, flops: dict) -> dict[str, dict[str, float]]:
    """Measured ratios beside the one that operations alone would give; ``over operations`` is their quotient."""
    table = {}
    pairs = {f"{name} / sft": (name, SFT) for name in VARIANTS if name != SFT}
    for label, (above, below) in {**pairs, "live / exact": (LIVE, EXACT), "live / standard": (LIVE, STANDARD)}.items():
        by_flops = flops[above] / flops[below]
        measured = median_ratio(seconds[above], seconds[below])
        table[label] = {
            "measured": round(measured, 3),
            "with loading": round(median_ratio(loaded[above], loaded[below]), 3),
            "operations": round(by_flops, 3),
            "measured over operations": round(measured / by_flops, 3),
        }
    return table


def report(body: dict[str, Any]) -> None:
    header = ("variant", "ms a step", "with loading", "GFLOP", "GFLOP/s", "peak MiB", "a loss")
    lines = []
    for name in VARIANTS:
        seconds = body["seconds_a_step"][name][1]
        gflop = body["gflop_a_step"][name]
        loaded = body["seconds_a_step_with_loading"][name][1]
        peak = body["memory_mib"][name]["peak"]
        cells = (f"{1e3 * seconds:.1f}", f"{1e3 * loaded:.1f}", f"{gflop:.2f}", f"{gflop / seconds:.1f}", f"{peak:.0f}")
        lines.append((name, *cells, body["loss_of_a_step"][name]))
    print_table(header, lines)
    print()
    columns = ("measured", "with loading", "operations", "measured over operations")
    print_table(("ratio", *columns), [(label, *one.values()) for label, one in body["ratios"].items()])
    print()
    print_table(("decoding", *body["decode"][EXACT]), [(name, *one.values()) for name, one in body["decode"].items()])
    print()


if __name__ == "__main__":
    main()
