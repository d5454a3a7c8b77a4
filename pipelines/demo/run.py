"""``kdcli demo``: the whole loop on the rendered world, on a CPU, in minutes.

world → doctor → cache the teacher → students ``sft`` and ``llava-kd`` from the same start and the same steps → eval → table and report.
Every step is the product's own pipeline with small numbers; nothing here knows how any of them works.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipelines.cache_teacher import capture
from pipelines.capture_shards import CaptureRequest
from pipelines.demo.write_world import WorldPaths, write_world
from pipelines.doctor import examine, print_report
from pipelines.evaluate import evaluate_folder, figures
from pipelines.output_lock import alone
from pipelines.progress import bar, capture_progress, train_progress
from pipelines.report.page import write_report
from pipelines.run_records import write_record
from pipelines.settings import CaptureSettings, Settings
from pipelines.tables import cache_table, score_table
from pipelines.train_student import train
from student_train.config import StageSettings, TrainSettings
from teacher_cache.errors import naming_full_disk
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.transformers import TeacherSpec

ASSETS = Path(str(files("pipelines.demo") / "assets"))
TEACHER = ASSETS / "teacher"
STUDENT_START = ASSETS / "student_start"
RUNS = {"sft": "PT,SFT,SFT", "llava-kd": "DPT,SFT,DFT"}
"""Method → stages: the same parts, trainable modules, steps and learning rates in both."""


@dataclass(frozen=True)
class Recipe:
    """Sizes of the demo, chosen for six minutes on two cores."""

    captions: int = 320
    train: int = 640
    defects: int = 8
    heldout: int = 280
    shards: int = 8
    batch_size: int = 16
    projector_steps: int = 40
    tuning_steps: int = 90
    projector_learning_rate: float = 2e-3
    tuning_learning_rate: float = 2e-3


def make_world(folder: Path, recipe: Recipe, seed: int = 0) -> tuple[WorldPaths, tuple[DataSpec, ...]]:
    """Rendered rows on disk in both real formats, and the mixture that reads them."""
    world = write_world(
        folder, captions=recipe.captions, train=recipe.train, heldout=recipe.heldout, seed=seed, defects=recipe.defects
    )
    captions = DataSpec("caption", str(world.captions), image_root=str(world.images), template="plain")
    return world, (captions, DataSpec("sft", str(world.train), template="chat"))


def make_cache(url: str, data: tuple[DataSpec, ...], recipe: Recipe, progress: Any = lambda *_: None) -> dict[str, Any]:
    """The default profile of the shipped teacher on the whole mixture; the capture's summary."""
    settings = CaptureSettings(shards=recipe.shards)
    return capture(CaptureRequest(TeacherSpec(str(TEACHER)), data, url, settings, {}), progress)


def student_settings(output: Path, recipe: Recipe, seed: int) -> Settings:
    """The same start, steps and learning rates for every method."""
    projector = StageSettings(max_steps=recipe.projector_steps, learning_rate=recipe.projector_learning_rate)
    tuning = StageSettings(max_steps=recipe.tuning_steps, learning_rate=recipe.tuning_learning_rate)
    train_settings = TrainSettings(
        student=str(STUDENT_START),
        output_dir=str(output),
        per_device_train_batch_size=recipe.batch_size,
        seed=seed,
    )
    stages = {"PT": projector, "DPT": projector, "SFT": tuning, "DFT": tuning}
    return Settings(train=train_settings, stages=stages)


def train_one(method: str, cache: str, output: Path, recipe: Recipe, seed: int, on_step: Any = lambda *_: None) -> str:
    """Train one student; its model folder."""
    return train(cache, method, student_settings(output, recipe, seed), RUNS[method], on_step=on_step)["model"]


def heldout(world: WorldPaths) -> DataSpec:
    return DataSpec("heldout", str(world.heldout), image_root=str(world.images))


def score(model: str, spec: DataSpec, console: Any = None, name: str = "") -> dict[str, Any]:
    """``pipelines.evaluate.score`` of a model folder, without the single answers; on a console, with a bar of this name."""
    if console is None:
        result = evaluate_folder(model, spec)
    else:
        with bar(console, "questions") as progress:
            task = progress.add_task(f"eval {name}", total=None)
            result = evaluate_folder(model, spec, advance=lambda rows: progress.advance(task, rows))
    return figures(result)


def run_demo(out: Path, seed: int, console: Any, recipe: Recipe | None = None) -> dict[str, Any]:
    """The whole loop; prints what it does and returns ``{"scores", "report", "seconds"}``."""
    with (
        naming_full_disk(out),
        alone(out, "kdcli demo", "--out", lambda text: console.print(text, highlight=False, markup=False)),
    ):
        return _run(out, seed, console, recipe or Recipe())


def _run(out: Path, seed: int, console: Any, recipe: Recipe) -> dict[str, Any]:
    started = time.perf_counter()
    with stage(
        console, "1/6 a world of rendered rows: LLaVA-1.5 json with captions, LLaVA-NeXT parquet with questions"
    ):
        world, data = make_world(out / "world", recipe)
    with stage(console, "2/6 doctor: defects of the mixture (some were planted)"):
        print_report(examine(list(data)), console)
    with stage(console, "3/6 cache the teacher: every field"):
        with capture_progress(console) as progress:
            summary = make_cache(str(out / "cache"), data, recipe, progress)
        console.print(cache_table(summary["columns"], summary["rows"]), highlight=False)
    models = {"teacher": str(TEACHER)}
    with stage(console, "4/6 two students, same start and same steps, no teacher in memory"):
        for method in RUNS:
            with train_progress(console, prefix=f"{method} ") as on_step:
                models[method] = train_one(method, str(out / "cache"), out / "runs" / method, recipe, seed, on_step)
    with stage(console, "5/6 held-out questions"):
        scores = {name: score(model, heldout(world), console, name) for name, model in models.items()}
        save_scores(out, scores)
        console.print(score_table(scores), highlight=False)
    with stage(console, "6/6 report"):
        runs = [out / "runs" / method for method in RUNS]
        page = write_report(runs, str(out / "cache"), out / "report.html", scores=scores, title="kdcli demo")
    seconds = time.perf_counter() - started
    console.print(f"done in {seconds:.0f} s: open {page}")
    return {"scores": scores, "report": str(page), "seconds": seconds}


def save_scores(out: Path, scores: Mapping[str, Any]) -> None:
    """``scores.json`` of the demo, and of every run, where a later report finds it."""
    write_record(out / "scores.json", scores)
    for name in RUNS:
        write_record(out / "runs" / name / "scores.json", {name: scores[name]})


@contextmanager
def stage(console: Any, title: str) -> Iterator[None]:
    """Heading before, seconds after."""
    console.print(f"\n[bold]{title}[/bold]")
    started = time.perf_counter()
    yield
    console.print(f"[dim]{time.perf_counter() - started:.0f} s[/dim]")


def quicker(recipe: Recipe, factor: float) -> Recipe:
    """A recipe with ``factor`` of the rows and steps, for tests."""
    sizes = ("captions", "train", "heldout", "projector_steps", "tuning_steps")
    return replace(recipe, **{name: max(8, int(getattr(recipe, name) * factor)) for name in sizes})
