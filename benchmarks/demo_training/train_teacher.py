"""One command that trains the demo's teacher from nothing: ``python -m benchmarks.demo_training.train_teacher --out FOLDER``."""

from __future__ import annotations

import pipelines.processes.quiet_threads  # noqa: F401 (before torch)

# isort: split
import argparse
import random
import shutil
from functools import partial
from pathlib import Path

import torch

from benchmarks.demo_training import ASSETS, lessons
from benchmarks.demo_training.loop import Group, Masters, Phase
from benchmarks.demo_training.model import TEACHER, build_model, export
from benchmarks.demo_training.recipe import TeacherRecipe
from benchmarks.demo_training.score import questions, teacher_forced_accuracy
from benchmarks.demo_training.score_teacher import write_scores
from benchmarks.demo_training.stream import batches, full_batch, tower_batch
from benchmarks.demo_training.tokenizer import load_tokenizer

DEFAULT_OUT = ASSETS / "teacher"


def train_tower(model, recipe: TeacherRecipe, work: Path, minutes: float | None, resume: bool) -> None:
    """Phase A: tower, projector and word embeddings from labelled patches."""
    heads = lessons.AttributeHeads(model.config.text_config.hidden_size)
    embeddings = model.get_input_embeddings()
    parts = [model.model.vision_tower, model.model.multi_modal_projector, embeddings, heads]
    masters = Masters([Group(part) for part in parts], recipe.tower_learning_rate, recipe)
    loss_of = partial(
        lessons.tower_loss, model, heads, word_ids=lessons.patch_word_ids(), attribute_weight=recipe.attribute_weight
    )
    phase = Phase("tower", recipe.tower_steps, minutes, work, recipe)
    phase.run(masters, loss_of, partial(batches, tower_batch, recipe, f"tower/{recipe.seed}"), resume)
    masters.restore_fp32(*parts)


def train_full(model, recipe: TeacherRecipe, work: Path, minutes: float | None, resume: bool) -> None:
    """Phase B: the whole model."""
    tower = Group(model.model.vision_tower, recipe.tower_learning_rate_ratio)
    masters = Masters([tower, Group(model)], recipe.learning_rate, recipe)
    loss_of = partial(
        lessons.answer_loss,
        model,
        word_ids=lessons.patch_word_ids(),
        vision_weight=recipe.vision_weight,
        vision_rows=recipe.vision_rows,
    )
    # Watched on train-split pictures: the held-out split is looked at once, at the end.
    asked = questions("train", 64, seed=recipe.seed)
    phase = Phase("full", recipe.steps, minutes, work, recipe, watch=partial(teacher_forced_accuracy, model, asked))
    phase.run(masters, loss_of, partial(batches, full_batch, recipe, f"full/{recipe.seed}"), resume)
    masters.restore_fp32(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--work", type=Path, default=Path("runs/demo_teacher"), help="checkpoints and log")
    parser.add_argument("--minutes", type=float, help="budget of the whole training; default: the recipe's steps")
    parser.add_argument("--tower-share", type=float, default=0.15, help="share of --minutes for the tower phase")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --work")
    parser.add_argument("--questions", type=int, default=200, help="held-out questions a family for scores.json")
    arguments = parser.parse_args()
    recipe = TeacherRecipe()
    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not arguments.resume:
        (arguments.work / "training_log.jsonl").unlink(missing_ok=True)
    share = arguments.tower_share
    minutes_a, minutes_b = (None, None) if arguments.minutes is None else (
        arguments.minutes * share, arguments.minutes * (1 - share)
    )  # fmt: skip
    model = build_model(TEACHER, load_tokenizer(), recipe.seed)
    train_tower(model, recipe, arguments.work, minutes_a, arguments.resume)
    train_full(model, recipe, arguments.work, minutes_b, arguments.resume)
    export(model, arguments.out)
    shutil.copy(arguments.work / "training_log.jsonl", arguments.out / "training_log.jsonl")
    write_scores(arguments.out, arguments.questions)


if __name__ == "__main__":
    main()
