"""Does a student from the cache become the student of the live teacher, and what does distillation gain? Paired by seed and data order.

    python -m benchmarks.students --seeds 5 --work runs/students [--captions 320 --train 800] [--save]

Four students a seed on the demo world: ``sft``; ``llava-kd`` from the default profile (``standard``), from bf16 hidden states
(``exact``) and from the teacher itself in every step (``live``). A seed has its own training rows, row order and held-out rows; its
students share them, the start, the steps and the learning rates. Besides scores: the cosine of each student's weight update after
``--update-steps`` steps with the live student's. Resumable: what is finished is not trained again. Recipes were chosen on seeds from
100 on; report seeds 0, 1, 2, ….
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from scipy.stats import t as student_t

from benchmarks.live_teacher import LiveTeacher
from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.demo.run import STUDENT_START, TEACHER, DemoRecipe, heldout, make_world, score
from pipelines.settings import CaptureSettings, Settings
from pipelines.terminal.tables import table
from pipelines.train.train_student import train
from student_train.config import StageSettings, TrainSettings
from student_train.teacher_view import TeacherHeads
from teacher_cache.teachers.transformers import TeacherSpec

VARIANTS = {"sft": ("sft", "exact"), "standard": ("llava-kd", "standard"), "exact": ("llava-kd", "exact")}
VARIANTS |= {"live": ("llava-kd", "exact")}
"""Student → method and the cache whose rows it reads; ``live`` takes nothing else from it."""
RECIPE = DemoRecipe(
    heldout=280, projector_steps=40, tuning_steps=90, projector_learning_rate=2e-3, tuning_learning_rate=2e-3
)
"""Where no flag says otherwise."""
STAGES = {"sft": "PT,SFT,SFT", "llava-kd": "DPT,SFT,DFT"}


def student_settings(output: Path, recipe: DemoRecipe, seed: int) -> Settings:
    """The same start, steps and learning rates for every method."""
    projector = StageSettings(max_steps=recipe.projector_steps, learning_rate=recipe.projector_learning_rate)
    tuning = StageSettings(max_steps=recipe.tuning_steps, learning_rate=recipe.tuning_learning_rate)
    train_settings = TrainSettings(
        student=str(STUDENT_START),
        output_dir=str(output),
        per_device_train_batch_size=recipe.batch_size,
        seed=seed,
    )
    return Settings(train=train_settings, stages={"PT": projector, "DPT": projector, "SFT": tuning, "DFT": tuning})


def train_variant(name: str, folder: Path, output: Path, settings: Settings, stages: str | None = None) -> str:
    """Train one student; its model folder."""
    method, cache = VARIANTS[name]
    signals = LiveTeacher.opener(str(TEACHER)) if name == "live" else TeacherHeads.open
    body = train(str(folder / cache), method, settings, stages or STAGES[method], open_signals=signals)
    return body["model"]


def run_seed(seed: int, recipe: DemoRecipe, variants: list[str], work: Path, update_steps: int) -> dict[str, Any]:
    """Scores of every student on one seed's world, and the cosines of their weight updates."""
    folder = work / f"seed-{seed}"
    world, data = make_world(folder / "world", recipe, seed)
    for store in ("standard", "exact"):
        settings = CaptureSettings(shards=recipe.shards, store=store)
        capture(CaptureRequest(TeacherSpec(str(TEACHER)), data, str(folder / store), settings, {}))
    scores = {}
    for name in variants:
        saved = folder / "scores" / f"{name}.json"
        if not saved.is_file():
            output = folder / "runs" / name
            settings = student_settings(output, recipe, seed)
            model = train_variant(name, folder, output, settings)
            saved.parent.mkdir(parents=True, exist_ok=True)
            saved.write_text(json.dumps(score(model, heldout(world))))
        scores[name] = json.loads(saved.read_text())
        print(f"seed {seed} {name}: {100 * scores[name]['family_mean']:.1f} % (mean of families)", flush=True)
    cosines = update_cosines(folder, recipe, seed, [name for name in variants if name != "sft"], update_steps)
    return {"seed": seed, "scores": scores, "update_cosines": cosines}


def update_cosines(folder: Path, recipe: DemoRecipe, seed: int, variants: list[str], steps: int) -> dict[str, float]:
    """Cosine of each student's weight change in one DFT stage of so many steps to the live student's."""
    if "live" not in variants:
        return {}
    updates = {}
    start = load_file(STUDENT_START / "model.safetensors")
    for name in variants:
        settings = student_settings(folder / "updates" / name, recipe, seed)
        settings = replace(
            settings, stages={"DFT": replace(settings.stages.get("DFT", StageSettings()), max_steps=steps)}
        )
        model = load_file(
            Path(train_variant(name, folder, folder / "updates" / name, settings, "DFT")) / "model.safetensors"
        )
        updates[name] = torch.cat([(model[key] - start[key]).flatten().double() for key in sorted(start)])
    live = updates.pop("live")
    return {name: float(one @ live / (one.norm() * live.norm())) for name, one in updates.items()}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (Student's t)."""
    if len(values) < 2:
        return statistics.mean(values), math.inf
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)


def mean_std(values: list[float]) -> str:
    """Percent with the sample standard deviation."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * (statistics.stdev(values) if len(values) > 1 else 0.0):.1f}"


def results_table(runs: list[dict[str, Any]], names: list[str]) -> str:
    """Exact match by family, mean ± std over seeds."""
    families = list(runs[0]["scores"][names[0]]["families"])
    rows = [
        [family, *(mean_std([run["scores"][n]["families"][family]["exact_match"] for run in runs]) for n in names)]
        for family in families
    ]
    rows.append(["mean of families", *(mean_std([run["scores"][n]["family_mean"] for run in runs]) for n in names)])
    return table([f"exact match, %, {len(runs)} seeds", *names], rows)


def paired(runs: list[dict[str, Any]], variants: list[str]) -> dict[str, dict[str, float]]:
    """Each student less the live one, in points: mean and half width of the 95 % interval; and the lowest update cosine."""
    result = {}
    for name in (one for one in variants if one != "live"):
        gaps = [100 * (run["scores"][name]["family_mean"] - run["scores"]["live"]["family_mean"]) for run in runs]
        mean, half = interval(gaps)
        cosines = [run["update_cosines"].get(name) for run in runs if name in run["update_cosines"]]
        result[name] = {"difference": mean, "half_width_95": half, "least_cosine": min(cosines, default=math.nan)}
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--update-steps", type=int, default=50)
    parser.add_argument("--work", type=Path, default=Path("runs/students"))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/students.json")
    for one in fields(DemoRecipe):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=None)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    given = {one.name: getattr(arguments, one.name) for one in fields(DemoRecipe)}
    recipe = replace(RECIPE, **{name: value for name, value in given.items() if value is not None})
    variants = arguments.variants.split(",")
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    runs = [run_seed(seed, recipe, variants, arguments.work, arguments.update_steps) for seed in seeds]
    print(results_table(runs, variants))
    differences = paired(runs, variants) if "live" in variants else {}
    for name, one in differences.items():
        print(
            f"{name} − live: {one['difference']:+.2f} ± {one['half_width_95']:.2f} points (95 %), "
            f"update cosine ≥ {one['least_cosine']:.5f}"
        )
    body = {
        "benchmark": "students",
        "recipe": asdict(recipe),
        "seeds": list(seeds),
        "paired": differences,
        "runs": runs,
    }
    if arguments.save:
        target = Path(__file__).parent / "results" / "students.json"
        target.write_text(json.dumps(body, indent=1) + "\n")
    means = [{name: one["scores"][name]["family_mean"] for name in one["scores"]} for one in runs]
    print(json.dumps({**body, "runs": means}))


if __name__ == "__main__":
    main()
