"""In which settings distillation gains: tuned sft beside distilled students, on worlds whose training answers are partly wrong.

    python -m benchmarks.gain --worlds 0,1,2 --seeds 0,1 --share 0 --share 0.4 [--save]
    python -m benchmarks.gain --share 0.4 --rows "sft, lr 5e-4;kd, reg=0" --train 640 --steps 4

One grid (``benchmarks/grids/gain.toml``) a world, number of training rows and share, run by ``kdcli ablate``: run again, it continues. A
pair is a world and a seed, that is, a row order: both students of a pair see the same rows in the same order for as many steps. Held-out
questions are clean, other than the trained ones, and other in every world. ``sft`` is trained at several learning rates; a table compares
with the rate whose nll is least on its own questions with an image. Those without are apart: the start can answer them, and any training
makes it forget some. Rows are separated by a semicolon; ``--steps 4`` takes four times as many.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from benchmarks.common import RESULTS, machine
from benchmarks.demo_cache import FIELDS
from pipelines.ablate.results import interval, spread, written
from pipelines.ablate.run import AblateRequest, ablate
from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.demo.gain import image_mean
from pipelines.demo.run import TEACHER, DemoRecipe, make_world
from pipelines.judge.evaluation.answers import answer, prompt_of
from pipelines.judge.evaluation.run import load_answering
from pipelines.settings import CaptureSettings
from pipelines.terminal.tables import table
from teacher_cache.records import Sample, Turn
from teacher_cache.sources import DataSpec, open_source
from teacher_cache.teachers.transformers import TeacherSpec

GRID = Path(__file__).parent / "grids" / "gain.toml"
OF_SFT = re.compile(r"sft, lr .*")
"""Rows that are the baseline, at one of its learning rates."""
UNLABELLED = 3
"""Pictures of ``WORLD/unlabelled``, in training rows of the world."""
FOLDER = re.compile(r"world-(\d+)-rows-(\d+)-wrong-([\d.]+)")
WANTED = ("response_topk", "response_hidden", "vision_topk", "vision_hidden", "affinity")
PLACE = ("rows", "steps", "share", "world", "seed", "row")
"""What tells students apart."""
METRICS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "with an image, %": lambda one: 100 * image_mean(one["families"], "exact_match"),
    "nll with an image": lambda one: image_mean(one["families"], "nll"),
    "text, %": lambda one: 100 * one["families"]["text"]["exact_match"],
    "all families, %": lambda one: 100 * one["family_mean"],
    "nll": lambda one: one["nll_family_mean"],
    "calibration error": lambda one: one["ece"],
}
"""Column → value of an evaluation's scores. Means of the image families; the family of text apart; means of all families."""


def make(folder: Path, recipe: DemoRecipe, world: int) -> None:
    """``folder/world`` and ``folder/cache``, the five fields of response and vision rows; what is there stays."""
    if (folder / "made.json").is_file():
        return
    _, data = make_world(folder / "world", recipe, world)
    summary = _capture(folder / "cache", data, recipe, WANTED)
    (folder / "made.json").write_text(json.dumps({"rows": summary["rows"], "recipe": repr(recipe)}))


def _capture(url: Path, data: Sequence[DataSpec], recipe: DemoRecipe, wanted: Sequence[str]) -> dict[str, Any]:
    fields = {name: FIELDS[name] for name in wanted}
    settings = CaptureSettings(shards=recipe.shards, fields=tuple(fields), workers=1)
    return capture(CaptureRequest(TeacherSpec(str(TEACHER)), tuple(data), str(url), settings, fields))


def make_answered(folder: Path, recipe: DemoRecipe, world: int, name: str, times: int = 1) -> None:
    """``folder/NAME``: a cache of the world's pictures and questions, ``times`` as many, whose answers are the teacher's greedy ones."""
    target = folder / f"{name}_world"
    if (target / "made.json").is_file():
        return
    made, _ = make_world(target, replace(recipe, train=times * recipe.train), world)
    for path in sorted(Path(made.train).parent.glob("*.parquet")):
        _answer_rows(path)
    captions = DataSpec("caption", str(made.captions), image_root=str(made.images), template="plain")
    answered = DataSpec("sft", str(made.train), template="chat")
    _capture(folder / name, (captions, answered), recipe, ("response_topk", "response_hidden"))
    (target / "made.json").write_text("{}")


def _answer_rows(path: Path) -> None:
    """The teacher's answers in place of those of one file."""
    rows, schema = pq.read_table(path).to_pylist(), pq.read_schema(path)
    opened = open_source(DataSpec("sft", str(path), template="chat"))
    samples = [row for group in opened.scan(500) for row in opened.read(group) if isinstance(row, Sample)]
    if len(samples) != len(rows):
        raise ValueError(f"{path}: {len(rows)} rows, {len(samples)} without a defect")
    for row, said in zip(rows, teacher_answers(samples)):
        for turn, text in zip(row["conversations"][1::2], said, strict=True):
            turn["value"] = text
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def teacher_answers(samples: Sequence[Sample], batch: int = 32) -> list[list[str]]:
    """Greedy answers to each row's questions in turn, the teacher's own answers before them."""
    model, processor = load_answering(str(TEACHER))
    said: list[list[str]] = [[] for _ in samples]
    turn = 0
    while waiting := [number for number, one in enumerate(samples) if len(one.turns) // 2 > turn]:
        for start in range(0, len(waiting), batch):
            chosen = waiting[start : start + batch]
            prompts = [prompt_of(_asked(samples[number], said[number])) for number in chosen]
            for number, text in zip(chosen, answer(model, processor, prompts)):
                said[number].append(text)
        turn += 1
    return said


def _asked(sample: Sample, said: Sequence[str]) -> Sample:
    """The row up to its next question and any answer, the earlier answers as ``said``."""
    questions = sample.turns[0 : 2 * len(said) + 1 : 2]
    turns = [part for question, text in zip(questions, [*said, ""]) for part in (question, Turn("assistant", text))]
    return replace(sample, turns=tuple(turns))


def chosen_variants(rows: Sequence[str]) -> tuple[str, list[str]]:
    """The grid file's head, and the text of the asked rows' variants in its order."""
    head, *variants = GRID.read_text().split("\n[[variants]]\n")
    names = {part.split('"')[1]: part for part in variants}
    if unknown := [row for row in rows if row not in names]:
        raise SystemExit(f"--rows {'; '.join(unknown)}: choose from {'; '.join(names)}")
    return head, [part for name, part in names.items() if name in rows]


def write_grid(folder: Path, seeds: Sequence[int], rows: Sequence[str], steps: int = 1) -> Path:
    """The grid of one world, with the asked rows alone. steps: times those of the file's last stages."""
    head, chosen = chosen_variants(rows)
    head = head.replace("max_steps = 200", f"max_steps = {200 * steps}")
    head = re.sub(r'baseline = ".*"', f'baseline = "{next(iter(rows))}"', head)
    grid = "\n[[variants]]\n".join([f"{head}\n[grid]\nseed = {list(seeds)}\n", *chosen])
    path = folder / f"gain-{steps}.toml"
    path.write_text("keep_models = false\n" + grid.replace("WORLD", str(folder)))
    return path


def run(out: Path, options: argparse.Namespace, recipe: DemoRecipe) -> None:
    """All students that are missing; the worlds of one seed before the next seed, so that an early table has all of them."""
    console = Console()
    parts = "".join(chosen_variants(options.rows)[1])
    for seed in options.seeds:
        for world in options.worlds:
            for share in options.share:
                folder, mine = (
                    out / f"world-{world}-rows-{recipe.train}-wrong-{share}",
                    replace(recipe, wrong_answers=share),
                )
                make(folder, mine, world)
                if "WORLD/answered" in parts:
                    make_answered(folder, mine, world, "answered")
                if "WORLD/unlabelled" in parts:
                    make_answered(folder, mine, world, "unlabelled", UNLABELLED)
                grid = write_grid(folder, [one for one in options.seeds if one <= seed], options.rows, options.steps)
                ablate(AblateRequest(grid, folder / f"students-{options.steps}", workers=options.workers), console)


def cells(out: Path) -> list[dict[str, Any]]:
    """Every finished student under ``out``: ``{"rows", "steps", "share", "world", "seed", "row", "scores"}``."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(out.glob("world-*/students-*/*/seed-*/cell.json")):
        card, students = json.loads(path.read_text()), path.parents[2]
        matched = FOLDER.fullmatch(students.parent.name)
        if matched and card.get("results"):
            world, rows, share = int(matched[1]), int(matched[2]), float(matched[3])
            where = {"rows": rows, "steps": int(students.name.split("-")[1]), "share": share, "world": world}
            scores = next(iter(card["results"].values()))["scores"]
            one = {**where, "seed": card["seed"], "row": card["row"], "scores": scores}
            found[str((*where.values(), one["seed"], one["row"]))] = one
    return list(found.values())


def save(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Add students to the saved ones, each with its machine; one that was saved before is replaced."""
    machines = json.loads(path.read_text())["machines"] if path.is_file() else []
    saved = json.loads(path.read_text())["cells"] if path.is_file() else []
    here = machine("cpu")
    machines = [one for one in machines if one["machine"] != here["machine"]] + [here]
    by_place = {str([one[name] for name in PLACE]): one for one in saved}
    by_place |= {str([one[name] for name in PLACE]): {**one, "machine": here["machine"]} for one in found}
    cells = sorted(by_place.values(), key=lambda one: tuple(one[name] for name in PLACE))
    path.write_text(json.dumps({"machines": machines, "cells": cells}, indent=1) + "\n")


def tables(found: Sequence[Mapping[str, Any]]) -> str:
    """Two tables a setting: means over pairs, and the paired difference to tuned sft with its 95 % interval."""
    parts = []
    for rows, steps, share in sorted({(one["rows"], one["steps"], one["share"]) for one in found}):
        mine = [one for one in found if (one["rows"], one["steps"], one["share"]) == (rows, steps, share)]
        names, tuned = list(dict.fromkeys(one["row"] for one in mine)), baseline(mine)
        title = f"{100 * share:.0f} % wrong answers, {rows:,} rows, {200 * steps} steps"
        parts.append(table([title, *METRICS, "pairs"], [_line(row, mine) for row in names]))
        less = [_difference(row, tuned, mine) for row in names if not OF_SFT.fullmatch(row)]
        parts.append(table([f"less {tuned}", *METRICS, "pairs"], less))
    return "\n\n".join(parts)


def baseline(found: Sequence[Mapping[str, Any]]) -> str:
    """Of the learning rates of sft that were trained on the most pairs, the row whose mean nll with an image is least."""
    values: dict[str, list[float]] = {}
    for one in found:
        if OF_SFT.fullmatch(one["row"]):
            values.setdefault(one["row"], []).append(METRICS["nll with an image"](one["scores"]))
    most = max((len(mine) for mine in values.values()), default=0)
    means = {row: sum(mine) / most for row, mine in values.items() if len(mine) == most}
    return min(means, key=means.__getitem__, default="sft")


def _line(row: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    mine = [one["scores"] for one in found if one["row"] == row]
    return [row, *(written(spread([of(one) for one in mine]), name) for name, of in METRICS.items()), str(len(mine))]


def differences(
    row: str, less: str, found: Sequence[Mapping[str, Any]], of: Callable[[Mapping[str, Any]], float]
) -> list[float]:
    """Row less another, a value a pair (world, seed) that both have."""
    both = [
        {(one["world"], one["seed"]): of(one["scores"]) for one in found if one["row"] == name} for name in (row, less)
    ]
    return [value - both[1][pair] for pair, value in sorted(both[0].items()) if pair in both[1]]


def _difference(row: str, less: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    cells, count = [], 0
    for name, of in METRICS.items():
        one = spread(values := differences(row, less, found, of))
        count = len(values)
        cells.append(written(one, name, signed=True) + interval(one, name))
    return [row, *cells, str(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(one) for one in text.split(",")]  # noqa: E731
    parser.add_argument("--out", type=Path, default=Path("runs/gain"))
    parser.add_argument("--worlds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--seeds", type=numbers, default=[0, 1])
    parser.add_argument("--share", type=float, action="append", help="of wrong training answers; several times")
    parser.add_argument("--rows", type=lambda text: text.split(";"), default=["sft, lr 5e-4", "kd, reg=0"])
    parser.add_argument("--captions", type=int, default=320)
    parser.add_argument("--train", type=int, default=640)
    parser.add_argument("--heldout", type=int, default=1540)
    parser.add_argument("--steps", type=int, default=1, help="times those of the grid's last stages")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tables", action="store_true", help="train nothing")
    parser.add_argument("--save", action="store_true", help="add to benchmarks/results/gain.json")
    options = parser.parse_args()
    options.share = options.share or [0.0, 0.4]
    sizes = {name: getattr(options, name) for name in ("captions", "train", "heldout")}
    if not options.tables:
        run(options.out, options, DemoRecipe(defects=0, **sizes))
    found = cells(options.out)
    print(tables(found))
    if options.save:
        save(RESULTS / "gain.json", found)
    print(json.dumps({"students": len(found)}))


if __name__ == "__main__":
    main()
