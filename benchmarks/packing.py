"""What does a real token cost in packed batches beside a row each?

Rows as LLaVA-1.5's mixture has them: 6 % are conversations without a picture, the others have one and answers of any length (lengths of
texts log-normal, σ = 0.8, about 150 tokens beside a picture and 735 without). Pictures and questions are the demo world's, asked until the
length is reached; the demo student in stage SFT / DFT, batches of 16 rows in memory.

    python -m benchmarks.packing [--repeats 5] [--save]

Packed and unpacked steps hold the same rows, so the ratio of seconds is that of seconds a real token.
Targets: real tokens of all places at least 0.97; packed / unpacked at most 0.75.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import argument_parser, finish, interleave, machine, median_ratio, print_table, timed
from benchmarks.stage_trainers import open_stage
from benchmarks.worlds import World, open_world, write_cache
from pipelines.demo.render import render
from pipelines.demo.world import WorldRow, train_rows
from student_train.dataset import TrainBatch
from student_train.metrics_log import read_sizes
from student_train.trainer import Trainer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.sources import DataSpec

METHODS = ("sft", "kd", "llava-kd")
FIELDS = ("response_topk", "vision_topk", "response_hidden", "vision_hidden")
TEXT_SHARE, BESIDE_A_PICTURE, ALONE, SPREAD, LONGEST = 0.06, 150, 735, 0.8, 2048
SHARE_TARGET, TIME_TARGET = 0.97, 0.75


def long_rows(rows: int, seed: int, tokens_of: Any) -> list[WorldRow]:
    """The world's rows with turns added, of itself and of others alike, up to each row's drawn length. tokens_of: text → tokens."""
    rng, found = random.Random(seed), []
    world = list(train_rows(4 * rows, seed))
    with_picture = [row for row in world if len(row.scenes) == 1]
    without = [row for row in world if not row.scenes]
    for number in range(rows):
        of_text = rng.random() < TEXT_SHARE
        alike = without if of_text else with_picture
        row = alike[number % len(alike)]
        wanted = min((ALONE if of_text else BESIDE_A_PICTURE) * rng.lognormvariate(0, SPREAD), LONGEST / 2)
        turns = list(row.turns)
        while sum(tokens_of(turn.question + turn.answer) for turn in turns) < wanted:
            turns += rng.choice(alike).turns
        found.append(replace(row, id=f"long-{number}", turns=tuple(turns)))
    return found


def lengthened(world: World, folder: Path, rows: int) -> World:
    """The demo's models with a mixture of ``rows`` such rows."""
    tokenizer, images = world.processor.tokenizer, folder / "pictures"
    images.mkdir()
    body = []
    for row in long_rows(rows, 0, lambda text: len(tokenizer(text)["input_ids"])):
        one: dict[str, Any] = {"id": row.id, "conversations": row.conversations}
        if row.scenes:
            one["image"] = f"{row.id}.png"
            render(row.scenes[0]).save(images / one["image"])
        body.append(one)
    (folder / "long.json").write_text(json.dumps(body))
    return replace(world, data=(DataSpec("sft", str(folder / "long.json"), image_root=str(images), template="chat"),))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="steps timed in one repeat")
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args(arguments)
    described = machine(options.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = lengthened(open_world(options, folder, 8), folder, options.batch * options.steps)
        capture, url = world.open_capture(), str(folder / "cache")
        write_cache(world, capture, url, "standard", FIELDS)
        results = {method: measure(options, world, url, method) for method in options.methods.split(",")}
    body = {"machine": described, "shapes": options.shapes, "models": world.describe(), "batch": options.batch}
    body |= {"results": results, "targets": {"real tokens": SHARE_TARGET, "packed / unpacked": TIME_TARGET}}
    print_table(
        ["method", "real tokens unpacked", "packed", "µs a token unpacked", "packed", "packed / unpacked"],
        [[name, *(f"{value:.3g}" for value in row.values())] for name, row in results.items()],
    )
    finish("packing", body, options.save)


def measure(options: Any, world: World, url: str, method: str) -> dict[str, float]:
    """Shares of real tokens, µs a real token, and the median of the ratios inside each repeat."""
    sides = {name: opened(options, world, url, method, name == "packed") for name in ("unpacked", "packed")}
    sizes = {name: read_sizes([one for step in steps for one in step]) for name, (_, steps) in sides.items()}
    seconds = interleave({name: lambda s=side: timed(lambda: run(*s), world.device) for name, side in sides.items()}, 1)
    seconds = interleave(
        {name: lambda s=side: timed(lambda: run(*s), world.device) for name, side in sides.items()}, options.repeats
    )
    real = sizes["packed"]["tokens"]
    assert real == sizes["unpacked"]["tokens"], "both sides read the same rows"
    shares = {f"real tokens {name}": round(real / one["places"], 4) for name, one in sizes.items()}
    costs = {f"µs a token {name}": round(1e6 * median(values) / real, 3) for name, values in seconds.items()}
    return {**shares, **costs, "packed / unpacked": round(median_ratio(seconds["packed"], seconds["unpacked"]), 3)}


def opened(options: Any, world: World, url: str, method: str, packing: bool) -> tuple[Trainer, list[list[TrainBatch]]]:
    """A fresh trainer and its first steps' batches."""
    _, trainer, batches_from = open_stage(
        world, TeacherCache(url), method, options.batch, options.steps, packing=packing
    )
    return trainer, [batches for _, batches in islice(batches_from(0), options.steps)]


def run(trainer: Trainer, steps: list[list[TrainBatch]]) -> None:
    for number, batches in enumerate(steps):
        trainer.step(number, batches)


if __name__ == "__main__":
    main()
