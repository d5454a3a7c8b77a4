"""A student that has learnt to look, with a projector that has not: where the students of the grids start from.

    python -m benchmarks.demo_start --out runs/grids

The papers start from a language model that follows an image within a few hundred steps of a fresh projector. The demo's start
(``pipelines/demo/assets/student_start``) does not: its language model has never seen a picture, and most of a short run goes by before
it looks at all, whatever the loss. So it is first trained plainly (PT, SFT) on a world of its own, without a teacher; then its
projector is drawn anew. Tower and language model are kept. Run again, it continues.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.demo.run import STUDENT_START, TEACHER, DemoRecipe, make_world
from pipelines.settings import CaptureSettings, Settings
from pipelines.train.train_student import train
from student_train.config import StageSettings, TrainSettings
from student_train.load_student import load_student, save_student
from student_train.metrics_log import StepResult
from teacher_cache.teachers.transformers import TeacherSpec

PARTS = ("caption", "sft")
WORLD_SEED = 1000
"""Other pictures and questions than those that the grids train on and ask."""
PROJECTOR_STEPS, LEARNING_RATE, BATCH = 100, 2e-3, 8


def make(out: Path, recipe: DemoRecipe, steps: int) -> Path:
    """``out/start``: the model folder."""
    work = out / "start_work"
    _, data = make_world(work / "world", recipe, WORLD_SEED)
    # Only the rows are wanted: one field that needs no calibration, of no part.
    samples = CaptureSettings(shards=recipe.shards, fields=("response_hidden",), parts_without_fields=PARTS)
    capture(
        CaptureRequest(
            TeacherSpec(str(TEACHER)), data, str(work / "cache"), samples, {"response_hidden": {"codec": "bf16"}}
        )
    )
    settings = Settings(
        train=TrainSettings(
            student=str(STUDENT_START),
            output_dir=str(work / "run"),
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            report_to="none",
        ),
        stages={"PT": StageSettings(max_steps=PROJECTOR_STEPS), "SFT": StageSettings(max_steps=steps)},
    )

    def on_step(stage: str, step: int, total: int, result: StepResult) -> None:
        if step % 50 == 0:
            print(f"{stage} {step}/{total} loss {result.loss:.3f}", flush=True)

    trained = train(str(work / "cache"), "sft", settings, "PT,SFT", on_step=on_step)["model"]
    return with_fresh_projector(trained, out / "start")


def with_fresh_projector(trained: str, folder: Path) -> Path:
    """The trained student's tower and language model beside the projector of the demo's start, which is untrained."""
    loaded: tuple[Any, Any] = load_student(trained, "sdpa")
    model, processor = loaded
    fresh: Any = load_student(str(STUDENT_START), "sdpa")[0]
    model.model.multi_modal_projector.load_state_dict(fresh.model.multi_modal_projector.state_dict())
    save_student(model, processor, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/grids"))
    parser.add_argument("--steps", type=int, default=1500, help="of SFT")
    parser.add_argument("--captions", type=int, default=960)
    parser.add_argument("--train", type=int, default=4000)
    given = parser.parse_args()
    recipe = replace(DemoRecipe(defects=0, heldout=8), captions=given.captions, train=given.train)
    print(make(given.out, recipe, given.steps))


if __name__ == "__main__":
    main()
