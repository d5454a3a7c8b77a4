"""What ``kdcli demo`` prints of its two students, over seeds: the spread that its report tells.

    python -m benchmarks.demo_gain --seeds 5 --save
    python -m benchmarks.demo_gain --seeds 2 --tune --save   # both at other learning rates, too

World, cache, students, steps and questions are the demo's; a seed is that of the order of rows. Run again, it continues.
``--save`` writes ``benchmarks/results/demo_gain.json``, which ``pipelines.demo.gain.KNOWN`` repeats; with ``--tune``,
``demo_gain_tuning.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common import RESULTS, machine
from pipelines.demo.gain import gain_of, image_mean
from pipelines.demo.run import DEMO, DemoRecipe, grid_of, make_cache, make_world
from pipelines.demo.students import DISTILLED, SFT, VARIANTS, Trained, train_and_ask
from pipelines.terminal.tables import table

RATES = {
    SFT: ("SFT", (7.8e-6, 1.56e-5, 3.125e-5, 6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3)),
    DISTILLED: ("DFT", (5e-4, 1e-3, 2e-3)),
}
"""Row → its second stage, and the learning rates that ``--tune`` tries beside the demo's own."""


def run(work: Path, seeds: int, share: float, tune: bool, console: Console) -> dict[str, Any]:
    """Train and ask what is missing; every seed's scores, and the gain of each."""
    recipe = replace(DEMO, wrong_answers=share)
    world, data = make_world(work / "world", recipe)
    make_cache(str(work / "cache"), data, recipe)
    others = at_other_rates(recipe) if tune else {}
    grid = grid_of(work, world, recipe, range(seeds), variants={**VARIANTS, **others})
    trained = train_and_ask(grid, work / "grid.toml", work / "students", console)
    gains = [
        gain_of([one for one in trained if one.seed == seed], len(world.wrong), world.answers) for seed in range(seeds)
    ]
    return {
        "benchmark": "demo_gain",
        "machine": machine("cpu"),
        "recipe": asdict(recipe),
        "seeds": list(range(seeds)),
        "wrong": len(world.wrong),
        "answers": world.answers,
        "questions": gains[0].questions,
        "points": [round(one.points, 2) for one in gains],
        "nats": [None if one.nats_less is None else round(one.nats_less, 4) for one in gains],
        "students": rows(trained),
    }


def at_other_rates(recipe: DemoRecipe) -> dict[str, dict[str, Any]]:
    """The demo's two rows at every other rate of ``RATES``."""
    own = {SFT: recipe.tuning_learning_rate, DISTILLED: recipe.distilling_learning_rate}
    return {
        f"{row} {rate:g}": {**VARIANTS[row], f"stage.{stage}.learning_rate": rate}
        for row, (stage, rates) in RATES.items()
        for rate in rates
        if rate != own[row]
    }


def rows(trained: Sequence[Trained]) -> dict[str, list[dict[str, Any]]]:
    """Row → a score a seed: exact match in percent and nats with an image, exact match of text, means of all families."""
    found: dict[str, list[dict[str, Any]]] = {}
    for one in trained:
        families = one.scores["families"]
        score = {
            "seed": one.seed,
            "percent": round(100 * image_mean(families, "exact_match"), 2),
            "nats": round(image_mean(families, "nll"), 4),
            "text percent": round(100 * families["text"]["exact_match"], 2),
            "all percent": round(100 * one.scores["family_mean"], 2),
            "all nats": round(one.scores["nll_family_mean"], 4),
        }
        found.setdefault(one.row, []).append(score)
    return found


def results_table(body: Mapping[str, Any]) -> str:
    """A line a seed; mean ± sample standard deviation below where there are several."""
    pairs = list(zip(*(body["students"][name] for name in (SFT, DISTILLED))))
    lines = [
        [str(a["seed"]), *map(cell, (a, b)), f"{p:+.1f}", f"{n:+.3f}"]
        for (a, b), p, n in zip(pairs, body["points"], body["nats"])
    ]
    if len(lines) > 1:
        points, nats = ((statistics.mean(body[key]), statistics.stdev(body[key])) for key in ("points", "nats"))
        lines.append(["mean", "", "", "{:+.1f} ± {:.1f}".format(*points), "{:+.3f} ± {:.3f}".format(*nats)])
    text = table(["seed", SFT, DISTILLED, "points", "nats"], lines)
    names = [*VARIANTS, *(name for name in body["students"] if name not in VARIANTS)]
    others = table(
        ["row", "with an image", "text", "all families"],
        [[name, *_all(body["students"][name])] for name in names],
    )
    return f"{text}\n\n{others}"


def _all(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Means over seeds."""
    mean = {name: statistics.fmean(one[name] for one in scores) for name in scores[0]}
    return [
        f"{mean['percent']:.1f} % / {mean['nats']:.3f}",
        f"{mean['text percent']:.1f} %",
        f"{mean['all percent']:.1f} % / {mean['all nats']:.3f}",
    ]


def cell(score: Mapping[str, Any]) -> str:
    return f"{score['percent']:.1f} % / {score['nats']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--wrong-answers", type=float, default=DEMO.wrong_answers, help="share of the training answers, 0 to 1"
    )
    parser.add_argument("--tune", action="store_true", help="also both at other learning rates")
    parser.add_argument("--work", type=Path, default=Path("runs/demo_gain"))
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/demo_gain.json, with --tune demo_gain_tuning.json"
    )
    given = parser.parse_args()
    body = run(given.work, given.seeds, given.wrong_answers, given.tune, Console())
    print(results_table(body))
    if given.save:
        (RESULTS / ("demo_gain_tuning.json" if given.tune else "demo_gain.json")).write_text(
            json.dumps(body, indent=1) + "\n"
        )
    print(json.dumps(body))


if __name__ == "__main__":
    main()
