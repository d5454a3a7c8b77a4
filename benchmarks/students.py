"""What does distillation gain? Students ``sft`` and ``llava-kd`` on the demo world, several seeds, paired.

    python benchmarks/students.py --seeds 3 --work runs/students [--methods sft,llava-kd] [--captions 320 --train 480] [--save]

Each seed has its own training rows, row order and held-out rows; both methods share them, the start, the steps and the learning
rates. Resumable: a finished student is not trained again. Recipes were chosen on seeds from 100 on; report seeds 0, 1, 2, ….
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from pipelines.cache_teacher import CaptureRequest, capture
from pipelines.demo.run import RUNS, TEACHER, Recipe, heldout, make_world, score, train_one
from pipelines.settings import CaptureSettings
from pipelines.tables import table
from teacher_cache.teachers.transformers import TeacherSpec

FIELDS = ("response_hidden", "vision_hidden")


def run_seed(seed: int, recipe: Recipe, methods: list[str], work: Path) -> dict[str, Any]:
    """Scores of every method (and the teacher) on one seed's world."""
    folder = work / f"seed-{seed}"
    world, data = make_world(folder / "world", recipe, seed)
    settings = CaptureSettings(shards=recipe.shards, fields=FIELDS)
    capture(CaptureRequest(TeacherSpec(str(TEACHER)), data, str(folder / "cache"), settings, {}))
    scores = {}
    for name in [*methods, "teacher"]:
        saved = folder / "scores" / f"{name}.json"
        if not saved.is_file():
            output = folder / "runs" / name
            model = str(TEACHER) if name == "teacher" else train_one(name, str(folder / "cache"), output, recipe, seed)
            saved.parent.mkdir(parents=True, exist_ok=True)
            saved.write_text(json.dumps(score(model, heldout(world))))
        scores[name] = json.loads(saved.read_text())
        print(f"seed {seed} {name}: {100 * scores[name]['family_mean']:.1f} % (mean of families)", flush=True)
    return scores


def mean_std(values: list[float]) -> str:
    """Percent with the sample standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f}"


def results_table(runs: list[dict[str, Any]], names: list[str]) -> str:
    """Exact match by family, mean ± std over seeds, and the paired difference of the first two methods."""
    families = list(runs[0][names[0]]["families"])
    rows = []
    for label, pick in [
        *((family, lambda one, family=family: one["families"][family]["exact_match"]) for family in families),
        ("mean of families", lambda one: one["family_mean"]),
    ]:
        columns = {name: [pick(run[name]) for run in runs] for name in names}
        paired = [b - a for a, b in zip(columns[names[0]], columns[names[1]])] if len(names) > 2 else []
        rows.append([label, *map(mean_std, columns.values()), *([mean_std(paired)] if paired else [])])
    difference = [f"{names[1]} − {names[0]}"] if len(names) > 2 else []
    return table([f"exact match, %, {len(runs)} seeds", *names, *difference], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", default=",".join(RUNS))
    parser.add_argument("--work", type=Path, default=Path("runs/students"))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/students.json")
    for one in fields(Recipe):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=None)
    arguments = parser.parse_args()
    given = {one.name: getattr(arguments, one.name) for one in fields(Recipe)}
    recipe = replace(Recipe(), **{name: value for name, value in given.items() if value is not None})
    methods = arguments.methods.split(",")
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    runs = [run_seed(seed, recipe, methods, arguments.work) for seed in seeds]
    print(results_table(runs, [*methods, "teacher"]))
    body = {"benchmark": "students", "recipe": asdict(recipe), "seeds": list(seeds), "scores": runs}
    if arguments.save:
        target = Path(__file__).parent / "results" / "students.json"
        target.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps({**body, "scores": [{n: one[n]["family_mean"] for n in one} for one in runs]}))


if __name__ == "__main__":
    main()
