"""``kdcli demo``: the whole loop on the rendered world, on a CPU, in minutes.

world → doctor → cache the teacher → students ``sft`` and ``kd`` from the same start and the same steps → table, sentence and report.
A share of the world's training answers is wrong, as in real mixtures: there a teacher pays. Every step is the product's own pipeline
with small numbers; nothing here knows how any of them works.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.demo.gain import KNOWN, compared, cost, gain_of, lead, spread
from pipelines.demo.students import STUDENT_START, Trained, grid_text, train_and_ask
from pipelines.demo.write_world import WorldPaths, write_world
from pipelines.judge.doctor import examine, print_report
from pipelines.judge.evaluation.run import evaluate_folder, figures
from pipelines.report.lead import Lead
from pipelines.report.page import write_report
from pipelines.report.runs import read_runs
from pipelines.settings import CaptureSettings
from pipelines.terminal.progress import bar, capture_progress
from pipelines.terminal.tables import cache_table, score_table
from pipelines.train.output_lock import alone
from pipelines.train.run_records import write_record
from teacher_cache.errors import naming_full_disk
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.transformers import TeacherSpec

__all__ = ["DEMO", "STUDENT_START", "TEACHER", "DemoRecipe", "heldout", "make_cache", "make_world", "run_demo", "score"]

TEACHER = Path(str(files("pipelines.demo") / "assets" / "teacher"))


@dataclass(frozen=True)
class DemoRecipe:
    """Sizes of the demo, chosen for four minutes on two cores. wrong_answers: share of the training answers.

    Each student has the best learning rate of those that ``benchmarks.demo_gain --tune`` tries.
    """

    captions: int = 320
    train: int = 640
    defects: int = 8
    wrong_answers: float = 0.0
    heldout: int = 560
    shards: int = 8
    batch_size: int = 16
    projector_steps: int = 20
    tuning_steps: int = 200
    projector_learning_rate: float = 1e-3
    tuning_learning_rate: float = 5e-4
    distilling_learning_rate: float = 1e-3


DEMO = DemoRecipe(wrong_answers=KNOWN.share)
"""What ``kdcli demo`` does without flags, and what ``KNOWN`` is of."""


def make_world(folder: Path, recipe: DemoRecipe, seed: int = 0) -> tuple[WorldPaths, tuple[DataSpec, ...]]:
    """Rendered rows on disk in both real formats, and the mixture that reads them."""
    world = write_world(
        folder,
        captions=recipe.captions,
        train=recipe.train,
        heldout=recipe.heldout,
        seed=seed,
        defects=recipe.defects,
        wrong_answers=recipe.wrong_answers,
    )
    captions = DataSpec("caption", str(world.captions), image_root=str(world.images), template="plain")
    return world, (captions, DataSpec("sft", str(world.train), template="chat"))


def make_cache(
    url: str, data: tuple[DataSpec, ...], recipe: DemoRecipe, progress: Any = lambda *_: None
) -> dict[str, Any]:
    """The default profile of the shipped teacher on the whole mixture; the capture's summary."""
    settings = CaptureSettings(shards=recipe.shards)
    return capture(CaptureRequest(TeacherSpec(str(TEACHER)), data, url, settings, {}), progress)


def heldout(world: WorldPaths) -> DataSpec:
    return DataSpec("heldout", str(world.heldout), image_root=str(world.images))


def score(model: str, spec: DataSpec, console: Any = None, name: str = "") -> dict[str, Any]:
    """``pipelines.judge.evaluation.run.score`` of a model folder, without the single answers; on a console, with a bar of this name."""
    if console is None:
        result = evaluate_folder(model, spec)
    else:
        with bar(console, "questions") as progress:
            task = progress.add_task(f"eval {name}", total=None)
            result = evaluate_folder(model, spec, advance=lambda rows: progress.advance(task, rows))
    return figures(result)


def run_demo(out: Path, seed: int, console: Any, recipe: DemoRecipe = DEMO) -> dict[str, Any]:
    """The whole loop; prints what it does and returns ``{"scores", "lead", "report", "seconds"}``. seed: of the order of rows."""
    with (
        naming_full_disk(out),
        alone(out, "kdcli demo", "--out", lambda text: console.print(text, highlight=False, markup=False)),
    ):
        return _run(out, seed, console, recipe)


def _run(out: Path, seed: int, console: Any, recipe: DemoRecipe) -> dict[str, Any]:
    started = time.perf_counter()
    with stage(
        console, "1/6 a world of rendered rows: LLaVA-1.5 json with captions, LLaVA-NeXT parquet with questions"
    ):
        world, data = make_world(out / "world", recipe)
        console.print(
            f"{len(world.wrong):,} of {world.answers:,} training answers are wrong on purpose", highlight=False
        )
    with stage(console, "2/6 doctor: defects of the mixture (some were planted)"):
        print_report(examine(list(data)), console)
    with stage(console, "3/6 cache the teacher: every field") as clock:
        known = (out / "cache" / "manifest.json").exists()
        with capture_progress(console) as progress:
            summary = make_cache(str(out / "cache"), data, recipe, progress)
        seconds = None if known else clock()
        console.print(cache_table(summary["columns"], summary["rows"]), highlight=False)
    with stage(console, "4/6 two students side by side, same start and same steps, no teacher in memory"):
        trained = train_and_ask(grid_of(out, world, recipe, [seed]), out / "grid.toml", out / "students", console)
    with stage(console, "5/6 held-out questions"):
        scores: dict[str, Mapping[str, Any]] = {"teacher": score(str(TEACHER), heldout(world), console, "teacher")}
        scores |= {one.row: one.scores for one in trained}
        write_record(out / "scores.json", scores)
        console.print(score_table(scores), highlight=False)
    with stage(console, "6/6 report"):
        size = sum(one["bytes"] for one in summary["columns"].values())
        told = tell(trained, world, recipe, seconds, size)
        page = write_report(
            [one.folder for one in trained],
            str(out / "cache"),
            out / "report.html",
            scores,
            title="kdcli demo",
            lead=told,
        )
    whole = time.perf_counter() - started
    console.print(f"\n[bold]{told.sentence}[/bold]", highlight=False)
    for name, text in told.facts:
        console.print(f"{name}: {text}", highlight=False, markup=False)
    console.print(f"done in {whole:.0f} s: open {page}")
    return {"scores": scores, "lead": told, "report": str(page), "seconds": whole}


def grid_of(out: Path, world: WorldPaths, recipe: DemoRecipe, seeds: Iterable[int], **more: Any) -> str:
    """The grid of both students on this world and ``out/cache``."""
    stages = {
        "PT": (recipe.projector_steps, recipe.projector_learning_rate),
        "SFT": (recipe.tuning_steps, recipe.tuning_learning_rate),
        "DFT": (recipe.tuning_steps, recipe.distilling_learning_rate),
    }
    return grid_text(world, str(out / "cache"), recipe.batch_size, stages, seeds, **more)


def tell(trained: Sequence[Trained], world: WorldPaths, recipe: DemoRecipe, seconds: float | None, size: int) -> Lead:
    """The demo's sentence, and what it rests on. seconds, size: of the capture, and bytes of the cache."""
    gain = gain_of(trained, len(world.wrong), world.answers)
    runs = dict(zip((one.row for one in trained), read_runs([one.folder for one in trained])))
    steps = (recipe.projector_steps, recipe.tuning_steps)
    rates = (recipe.tuning_learning_rate, recipe.distilling_learning_rate)
    facts = {"Compared": compared(gain, steps, recipe.batch_size, rates)}
    if recipe == DEMO:
        facts["Over seeds"] = spread(KNOWN)
    return lead(gain, {**facts, "Cost": cost(runs, seconds, size)})


@contextmanager
def stage(console: Any, title: str) -> Iterator[Callable[[], float]]:
    """Heading before, seconds after; gives a clock of the seconds since."""
    console.print(f"\n[bold]{title}[/bold]")
    started = time.perf_counter()
    yield lambda: time.perf_counter() - started
    console.print(f"[dim]{time.perf_counter() - started:.0f} s[/dim]")
