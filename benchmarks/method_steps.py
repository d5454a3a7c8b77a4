"""What does one optimizer step of every distillation method cost beside SFT of the same student, from a cache of exact fields?

``em-kd`` also from a cache of the default profile, ``standard``.

The demo student in stage DFT (projector and language model train, tower frozen), one micro-batch a step. Methods that look at vision
tokens through matching (``em-kd``: exact, and with 512 sampled columns) train a student whose patch grid is average-pooled, and stand
beside SFT of that student; all others stand beside SFT of the student as it is. EPIC's two methods are timed in the middle of
their schedule, at layer 1 (the demo student has three).

    python -m benchmarks.method_steps [--repeats 5] [--only em-kd epic-tcd] [--save]
    python -m benchmarks.method_steps --device cuda --shapes real --only em-kd

Every method holds a student and an optimizer of its own: with real shapes, name a few at a time. On a CPU the clock is the processor
time of this process, which other work on the machine disturbs less than the wall's. Floating-point operations are counted by
``torch.utils.flop_counter`` over the actual step: matrix products, convolutions and attention, so neither distances nor softmaxes.
Targets: em-kd at most 1.5 × SFT, EPIC at most 1.7 × SFT.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import argument_parser, clocked, finish, interleave, machine, median_ratio, print_table, spread
from benchmarks.stage_trainers import open_stage
from benchmarks.step_variants import Variant
from benchmarks.worlds import World, open_world, write_cache
from teacher_cache.reading.cache import TeacherCache

BATCH = {"demo": 16, "real": 4}
EXACT, STANDARD = "exact", "standard"
FIELDS_OF = {
    EXACT: ("response_hidden", "vision_hidden", "affinity", "attention", "vision_features"),
    STANDARD: ("response_topk", "vision_topk", "response_hidden", "vision_hidden", "affinity"),
}
"""Profile → the fields of its cache here."""
SCHEDULE = 1000
"""Steps of a stage, of which those around the middle are timed."""
SFT, POOLED_SFT = "sft", "sft, pooled"


@dataclass(frozen=True)
class Case:
    """A method as it is timed.

    pooled: its student's vision tokens. target: seconds over those of SFT at most; None: no target. profile: of the cache.
    """

    method: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    pooled: bool = False
    target: float | None = None
    profile: str = EXACT

    @property
    def base(self) -> str:
        return POOLED_SFT if self.pooled else SFT


CASES = {
    SFT: Case("sft"),
    POOLED_SFT: Case("sft", pooled=True),
    "em-kd exact": Case("em-kd", pooled=True, target=1.5),
    "em-kd 512 columns": Case("em-kd", {"columns": 512}, pooled=True, target=1.5),
    "em-kd exact, standard": Case("em-kd", pooled=True, target=1.5, profile=STANDARD),
    "em-kd 512 columns, standard": Case("em-kd", {"columns": 512}, pooled=True, target=1.5, profile=STANDARD),
    "epic-tcd": Case("epic-tcd", {"layer": 1}, target=1.7),
    "epic-lcd": Case("epic-lcd", {"lowest_layer": 1}, target=1.7),
    "kd": Case("kd"),
    "minillm-offline": Case("minillm-offline"),
    "distillm-offline": Case("distillm-offline"),
    "jsd": Case("jsd"),
    "llavadi": Case("llavadi"),
    "align-kd": Case("align-kd"),
    "llava-kd": Case("llava-kd"),
}
METHODS = sorted({case.method for case in CASES.values()} - {"sft"})


def parse(arguments: Sequence[str] | None) -> Any:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--batch", type=int, default=0, help="rows of a step; 0: 16 (demo), 4 (real)")
    parser.add_argument("--steps", type=int, default=4, help="steps timed in one repeat")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS, help="methods, beside their SFT")
    options = parser.parse_args(arguments)
    options.batch = options.batch or BATCH[options.shapes]
    return options


def chosen(methods: Sequence[str]) -> dict[str, Case]:
    """The cases of some methods and the SFT that each stands beside."""
    wanted = {name for name, case in CASES.items() if case.method in methods}
    wanted |= {CASES[name].base for name in wanted}
    return {name: case for name, case in CASES.items() if name in wanted}


def write_caches(world: World, folder: Path, profiles: set[str]) -> dict[str, TeacherCache]:
    """Profile → a complete cache of its fields."""
    capture = world.open_capture()
    for profile in sorted(profiles):
        write_cache(world, capture, str(folder / profile), profile, FIELDS_OF[profile])
    return {profile: TeacherCache(str(folder / profile)) for profile in profiles}


def build(case: Case, name: str, options: Any, world: World, cache: TeacherCache) -> Variant:
    """The case's trainer in the middle of its schedule; every case's batches hold the same rows."""
    _, trainer, batches_from = open_stage(
        world, cache, case.method, options.batch, options.steps, case.knobs, pooled=case.pooled
    )
    trainer.total_steps = SCHEDULE
    return Variant(name, trainer, batches_from, first_step=SCHEDULE // 2)


def measure(options: Any, cases: Mapping[str, Case], variants: Mapping[str, Variant]) -> dict[str, Any]:
    """Operations and seconds a step of every case, and both over those of its SFT."""
    steps = {name: variant.steps(options.steps) for name, variant in variants.items()}
    flops = {name: variant.flops(steps[name][0]) for name, variant in variants.items()}
    runs = {n: partial(clocked, partial(v.run, steps[n]), options.device) for n, v in variants.items()}
    interleave(runs, 1)  # warm-up
    seconds = interleave(runs, options.repeats)
    return {
        "gflop_a_step": {name: round(total / 1e9, 3) for name, total in flops.items()},
        "seconds_a_step": {name: [one / options.steps for one in spread(values)] for name, values in seconds.items()},
        "ratios": {
            name: ratios(seconds[name], seconds[case.base], flops[name] / flops[case.base], case.target)
            for name, case in cases.items()
            if name != case.base
        },
    }


def ratios(own: Sequence[float], base: Sequence[float], operations: float, target: float | None) -> dict[str, Any]:
    """``over operations``: what is left of the measured ratio when operations alone would give ``operations``."""
    measured = median_ratio(own, base)
    return {
        "measured": round(measured, 3),
        "operations": round(operations, 3),
        "over operations": round(measured / operations, 3),
        "target": target,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    described = machine(options.device)
    cases = chosen(options.only)
    with tempfile.TemporaryDirectory() as folder:
        # A quarter of the demo's rows are captions, which no step here reads.
        world = open_world(options, Path(folder), options.batch * options.steps * 4 // 3 + 4)
        caches = write_caches(world, Path(folder), {case.profile for case in cases.values()})
        variants = {name: build(case, name, options, world, caches[case.profile]) for name, case in cases.items()}
        body = measure(options, cases, variants)
        models = world.describe()
    report(cases, body)
    sizes = {"batch": options.batch, "steps_a_repeat": options.steps, "repeats": options.repeats}
    body = {"machine": described, "shapes": options.shapes, "models": models, **sizes, **body}
    finish("method_steps", body, options.save)


def report(cases: Mapping[str, Case], body: dict[str, Any]) -> None:
    header = ("method", "ms a step", "GFLOP", "over", "measured", "operations", "over operations", "target")
    rows = []
    for name, case in cases.items():
        cells = (f"{1e3 * body['seconds_a_step'][name][1]:.1f}", f"{body['gflop_a_step'][name]:.2f}")
        one = body["ratios"].get(name)
        shown = (case.base, *("" if value is None else value for value in one.values())) if one else ("",) * 5
        rows.append((name, *cells, *shown))
    print_table(header, rows)
    print()


if __name__ == "__main__":
    main()
