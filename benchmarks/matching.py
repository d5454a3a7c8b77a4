"""What does EM-KD's matching cost, exact and from sampled columns, and how good are the assignments of a sampled cost?

The demo teacher (144 vision tokens an image) and the demo's start of a student, whose patch grid is average-pooled to 36 tokens, in an
em-kd step from a cache of exact hidden states (stage DFT). Every variant's matching is timed over the batches of a few steps, and the
steps with it; share is the one over the other. Quality: each image is matched once by the exact cost and once by the sampled one;
both assignments are judged by the exact cost.

    python -m benchmarks.matching [--repeats 5] [--save]
    python -m benchmarks.matching --device cuda --shapes real --batch 4

On a CPU the clock is the processor time of this process, which other work on the machine disturbs less than the wall's.

Targets: exact at most 40 % of the step; sampled at most 10 % of it with a total cost of at most 1.001 × the optimum.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import argument_parser, clocked, finish, interleave, machine, median_ratio, print_table, spread
from benchmarks.stage_trainers import open_stage
from benchmarks.worlds import World, open_world, write_cache
from student_train.dataset import TrainBatch
from student_train.group_costs import column_sampled_costs
from student_train.losses.matching import manhattan_cost, match
from student_train.losses.terms import StudentRows
from student_train.match_groups import MatchGroup, first_rows
from student_train.teacher_view import TeacherView
from student_train.trainer import Trainer
from teacher_cache.reading.cache import TeacherCache

BATCH = {"demo": 16, "real": 4}
COLUMNS = {"demo": (256, 512, 1024, 2048), "real": (512, 1024, 2048, 4096, 8192)}
FIELDS = ("response_hidden", "vision_hidden", "affinity")
EXACT = "exact"
TARGETS = {"exact / step": 0.40, "sampled / step": 0.10, "cost / optimum": 1.001}
Sides = tuple[TeacherView, StudentRows, TrainBatch]


def parse(arguments: Sequence[str] | None) -> Any:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--batch", type=int, default=0, help="rows of a step; 0: 16 (demo), 4 (real)")
    parser.add_argument(
        "--steps", type=int, default=5, help="steps timed in one repeat; their images are matched for quality"
    )
    options = parser.parse_args(arguments)
    options.batch = options.batch or BATCH[options.shapes]
    return options


def open_trainer(options: Any, world: World, url: str) -> tuple[Trainer, list[TrainBatch]]:
    """An em-kd stage on a fresh student with pooled vision tokens, and one micro-batch for every step."""
    write_cache(world, world.open_capture(), url, "exact", FIELDS)
    _, trainer, batches_from = open_stage(world, TeacherCache(url), "em-kd", options.batch, options.steps, pooled=True)
    return trainer, [batches[0] for _, batches in zip(range(options.steps), (b for _, b in batches_from(0)))]


@torch.no_grad()
def both_sides(trainer: Trainer, batch: TrainBatch) -> Sides:
    """What the matching of this micro-batch looks at."""
    inputs = batch.batch.to(trainer.processes.device)
    with trainer._autocast():
        hidden = trainer.network(inputs, trainer.kinds, None)
    return trainer.see_teacher(batch), trainer.model.rows(hidden, inputs, batch.student_text), batch


def with_columns(trainer: Trainer, variant: str) -> Any:
    """The stage's matching with so many sampled columns."""
    return replace(trainer.matching, columns=0 if variant == EXACT else int(variant))


def time_variants(options: Any, trainer: Trainer, sides: list[Sides], variants: list[str]) -> dict[str, Any]:
    """Seconds a step of every variant's matching alone and of the whole step with it, and the one over the other."""
    matchings = {name: with_columns(trainer, name) for name in variants}

    def alone(name: str) -> float:
        generator = torch.Generator().manual_seed(0)

        def run() -> None:
            for view, student, batch in sides:
                matchings[name].align(view, student, batch, generator)

        return clocked(run, options.device)

    def whole(name: str) -> float:
        trainer.matching = matchings[name]
        return clocked(lambda: [trainer.step(i, [batch]) for i, (_, _, batch) in enumerate(sides)], options.device)

    runs = {
        f"{name} {what}": partial(run, name) for name in variants for what, run in (("match", alone), ("step", whole))
    }
    interleave(runs, 1)  # warm-up
    seconds = interleave(runs, options.repeats)
    return {
        name: {
            "ms a step, matching": spread([1e3 * s / len(sides) for s in seconds[f"{name} match"]]),
            "ms a step, all": spread([1e3 * s / len(sides) for s in seconds[f"{name} step"]]),
            "share": round(median_ratio(seconds[f"{name} match"], seconds[f"{name} step"]), 4),
        }
        for name in variants
    }


@torch.no_grad()
def judge(sides: list[Sides], columns: Sequence[int]) -> tuple[int, dict[str, Any]]:
    """(images, by number of columns: exact cost of the assignment over the optimum, and the share of equal pairs)."""
    generator = torch.Generator().manual_seed(0)
    ratios: dict[int, list[float]] = {count: [] for count in columns}
    equal: dict[int, list[float]] = {count: [] for count in columns}
    for view, student, batch in sides:
        assert view.raw_vision is not None
        counts = batch.batch.counts["vision"]
        for number, (count, first) in enumerate(zip(counts, first_rows(batch.layouts))):
            if not count:
                continue
            theirs = view.raw_vision[first : first + sum(image.tokens() for image in batch.layouts[number])]
            given = theirs, student.of_sample("vision", number), student.head
            exact = manhattan_cost(*given)
            best, every = match(exact), torch.arange(count, device=exact.device)
            for m in columns:
                (cost,) = column_sampled_costs(*given, [MatchGroup(torch.arange(len(theirs)), every)], m, generator)
                found = match(cost)
                ratios[m].append(float(exact[found, every].sum() / exact[best, every].sum()))
                equal[m].append(float((found == best).float().mean()))
    images = len(next(iter(ratios.values())))
    return images, {
        str(m): {
            "cost / optimum, median": round(median(ratios[m]), 6),
            "cost / optimum, worst": round(max(ratios[m]), 6),
            "equal pairs": round(sum(equal[m]) / images, 3),
        }
        for m in columns
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    described = machine(options.device)
    columns = COLUMNS[options.shapes]
    with tempfile.TemporaryDirectory() as folder:
        # A quarter of the demo's rows are captions, which no step here reads.
        world = open_world(options, Path(folder), options.batch * options.steps * 4 // 3 + 4)
        models = world.describe()
        trainer, batches = open_trainer(options, world, str(Path(folder) / "cache"))
        sides = [both_sides(trainer, batch) for batch in batches]
        images, quality = judge(sides, columns)
        times = time_variants(options, trainer, sides, [EXACT, *map(str, columns)])
    report(times, quality)
    body = {
        "machine": described,
        "shapes": options.shapes,
        "models": models,
        "student_vision_tokens": max(max(batch.batch.counts["vision"]) for batch in batches),
        "batch": options.batch,
        "steps_a_repeat": options.steps,
        "repeats": options.repeats,
        "images": images,
        "times": times,
        "quality": quality,
        "targets": TARGETS,
    }
    finish("matching", body, options.save)


def report(times: dict[str, Any], quality: dict[str, Any]) -> None:
    header = ("columns", "matching, ms a step", "step, ms", "share", "cost / optimum", "worst", "equal pairs")
    rows = []
    for name, one in times.items():
        values = quality.get(name, {"median": 1.0, "worst": 1.0, "equal pairs": 1.0}).values()
        step = [f"{one[f'ms a step, {what}'][1]:.1f}" for what in ("matching", "all")]
        rows.append((name, *step, f"{one['share']:.1%}", *values))
    print_table(header, rows)


if __name__ == "__main__":
    main()
