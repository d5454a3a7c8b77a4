"""How fast are both backends of the teacher on the same rows, and how far apart is what they say?

In turns, in one process: transformers and vLLM by its route ``hidden``, for what the profile ``standard`` wants; then both for ``compact``,
vLLM by ``hidden`` and by ``logprobs``. Rows are prepared before; encoding and writing are not timed. vLLM decodes and prepares the
pictures a second time, inside its time. Runs where vLLM is installed: `make test-vllm` makes such an environment.

    .venv-vllm/bin/python -m benchmarks.backends [--repeats 3] [--rows 64] [--save]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import argument_parser, finish, interleave, machine, median_ratio, print_table, spread, timed
from benchmarks.worlds import World, open_world
from pipelines.capture.profiles import PROFILES
from teacher_cache.capturing.cache_shard import ask
from teacher_cache.fields import create_field
from teacher_cache.preparing.batch import token_batches
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Prepared, Sample, TeacherOutput
from teacher_cache.sources import open_source
from teacher_cache.teachers.backends import open_teacher
from teacher_cache.teachers.transformers import TeacherSpec
from teacher_cache.teachers.vllm_engine import vllm_version
from teacher_cache.wants import Wants

PAIRS = (("standard", "hidden"), ("compact", "hidden"), ("compact", "logprobs"))
"""(profile, vLLM's route), each measured beside transformers."""
WARM_UP = 8


def parse(arguments: Sequence[str] | None) -> Any:
    parser = argument_parser(__doc__ or "")
    parser.set_defaults(repeats=3)
    parser.add_argument("--rows", type=int, default=64, help="rows of the world")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="padded tokens of one batch")
    return parser.parse_args(arguments)


def prepared_rows(world: World) -> list[Prepared]:
    preparer = Preparer(world.processor, world.teacher_config)
    return [
        preparer.prepare(row, spec.template)
        for spec in world.data
        for source in [open_source(spec)]
        for group in source.scan(1000)
        for row in source.read(group)
        if isinstance(row, Sample)
    ]


def wants_of(profile: str) -> Wants:
    """What the teacher must compute for a profile."""
    return Wants.together(create_field(name, params).wants for name, params in PROFILES[profile].items())


def furthest(ours: Sequence[TeacherOutput], theirs: Sequence[TeacherOutput]) -> dict[str, float]:
    """Largest difference over all rows: of the log-probs by rank, and of the log tails."""
    heads = [
        (one.topk[kind], other.topk[kind])
        for one, other in zip(ours, theirs)
        for kind in one.topk
        if len(one.topk[kind])
    ]
    return {
        column: max(float((getattr(a, column) - getattr(b, column)).abs().max()) for a, b in heads)
        for column in ("log_probs", "log_tail")
    }


def measure(options: Any, spec: TeacherSpec, world: World, rows: Sequence[Prepared]) -> dict[str, dict[str, Any]]:
    parts = world.processor, world.teacher_config
    live = open_teacher(spec, *parts)
    table = {}
    for profile, route in PAIRS:
        vllm = open_teacher(replace(spec, backend="vllm", vllm_route=route), *parts)
        wants = wants_of(profile)
        for teacher in (live, vllm):
            ask(teacher, rows[:WARM_UP], wants, options.batch_tokens)
        runs: dict[str, Callable[[], float]] = {
            name: partial(timed, partial(ask, teacher, rows, wants, options.batch_tokens), options.device)
            for name, teacher in (("transformers", live), ("vllm", vllm))
        }
        seconds = interleave(runs, options.repeats)
        said = [ask(teacher, rows, wants, options.batch_tokens) for teacher in (vllm, live)]
        tokens = sum(map(len, rows))
        table[f"{profile}, {route}"] = {
            "seconds": {name: spread(each) for name, each in seconds.items()},
            "rows_per_second": {name: round(len(rows) / spread(each)[1], 3) for name, each in seconds.items()},
            "tokens_per_second": {name: round(tokens / spread(each)[1], 1) for name, each in seconds.items()},
            "vllm_speed_of_transformers": round(median_ratio(seconds["transformers"], seconds["vllm"]), 4),
            "largest_difference": furthest(*said),
        }
    return table


def report(body: dict[str, Any]) -> None:
    header = ("wants, route", "rows/s transformers", "rows/s vllm", "tokens/s vllm", "ratio", "log-probs", "log tails")
    lines = [
        (
            name,
            f"{one['rows_per_second']['transformers']:.2f}",
            f"{one['rows_per_second']['vllm']:.2f}",
            f"{one['tokens_per_second']['vllm']:.0f}",
            f"{one['vllm_speed_of_transformers']:.3f}",
            *(f"{one['largest_difference'][column]:.1e}" for column in ("log_probs", "log_tail")),
        )
        for name, one in body["pairs"].items()
    ]
    print_table(header, lines)
    print()


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    described = machine(options.device) | {"vllm": vllm_version()}
    with tempfile.TemporaryDirectory() as folder:
        world = open_world(options, Path(folder), options.rows)
        spec = TeacherSpec(str(Path(options.models) / "teacher"), dtype="float32", device=options.device)
        rows = prepared_rows(world)
        body = {
            "machine": described,
            "shapes": options.shapes,
            "models": world.describe(),
            "rows": len(rows),
            "tokens": sum(map(len, rows)),
            "batches": len(token_batches(rows, options.batch_tokens)),
            "repeats": options.repeats,
            "pairs": measure(options, spec, world, rows),
        }
    report(body)
    finish("backends", body, options.save)


if __name__ == "__main__":
    main()
