"""The students' common start: ``python -m benchmarks.demo_training.train_student_start``.

As in real life, a vision tower trained on pictures and a language model trained on text that have never met: the tower
learns patch words through a head of its own, the language model reads the world's text without a single picture, and
the projector between them is random. No picture is ever shown with a question here.
"""

from __future__ import annotations

import pipelines.processes.quiet_threads  # noqa: F401 (before torch)

# isort: split
import argparse
import json
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.demo_training import ASSETS, lessons
from benchmarks.demo_training.loop import Group, Masters, Phase
from benchmarks.demo_training.model import STUDENT, build_model, export, parameter_count
from benchmarks.demo_training.patch_labels import PATCH_WORDS
from benchmarks.demo_training.recipe import StudentRecipe
from benchmarks.demo_training.stream import batches, text_batch, tower_batch
from benchmarks.demo_training.tokenizer import load_tokenizer

DEFAULT_OUT = ASSETS / "student_start"


def train_tower(model, recipe: StudentRecipe, work: Path, resume: bool) -> None:
    """The vision tower alone."""
    tower = model.model.vision_tower
    head = nn.Linear(model.config.vision_config.hidden_size, len(PATCH_WORDS))
    masters = Masters([Group(tower), Group(head)], recipe.tower_learning_rate, recipe)
    phase = Phase("student_tower", recipe.tower_steps, None, work, recipe)
    stream = partial(batches, tower_batch, recipe, f"student_tower/{recipe.seed}")
    phase.run(masters, partial(lessons.lone_tower_loss, tower, head), stream, resume)
    masters.restore_fp32(tower)


def train_language_model(model, recipe: StudentRecipe, work: Path, resume: bool) -> None:
    """The language model alone."""
    masters = Masters([Group(model.model.language_model)], recipe.text_learning_rate, recipe)
    loss_of = partial(lessons.language_loss, model, pad_id=model.config.text_config.pad_token_id)
    phase = Phase("student_text", recipe.text_steps, None, work, recipe)
    phase.run(masters, loss_of, partial(batches, text_batch, recipe, f"student_text/{recipe.seed}"), resume)
    masters.restore_fp32(model.model.language_model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--work", type=Path, default=Path("runs/demo_student_start"), help="checkpoints and log")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --work")
    arguments = parser.parse_args()
    recipe = StudentRecipe()
    torch.manual_seed(recipe.seed)
    arguments.work.mkdir(parents=True, exist_ok=True)
    log = arguments.work / "training_log.jsonl"
    if not arguments.resume:
        log.unlink(missing_ok=True)
    model = build_model(STUDENT, load_tokenizer(), recipe.seed)
    train_tower(model, recipe, arguments.work, arguments.resume)
    train_language_model(model, recipe, arguments.work, arguments.resume)
    export(model, arguments.out)
    (arguments.out / "training_log.jsonl").write_text(log.read_text())
    print(json.dumps({"out": str(arguments.out), "parameters": parameter_count(model)}))


if __name__ == "__main__":
    main()
