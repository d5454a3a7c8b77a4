"""The demo world and one cache of it from which every method trains: what the grids in ``benchmarks/grids`` read.

    python -m benchmarks.demo_cache --out runs/grids --captions 960 --train 1600 --heldout 420

Top-8 of response and vision rows, their hidden states as bf16, affinities, first-layer
attention and vision features: exact wherever a codec can be. Run again, it
continues. Held-out questions are others than the trained ones, as in the demo.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.demo.run import TEACHER, DemoRecipe, make_world
from pipelines.settings import CaptureSettings
from pipelines.terminal.tables import cache_table
from teacher_cache.teachers.transformers import TeacherSpec

FIELDS: dict[str, dict[str, Any]] = {
    "response_topk": {"k": 8},
    "vision_topk": {"k": 8},
    "response_hidden": {"codec": "bf16"},
    "vision_hidden": {"codec": "bf16"},
    "affinity": {"layout": "dense"},
    "attention": {},
    "vision_features": {"codec": "bf16"},
}


def make(out: Path, recipe: DemoRecipe, seed: int) -> dict[str, Any]:
    """``out/world`` and ``out/cache``; the capture's summary. A share of the training answers is wrong where the recipe says so."""
    _, data = make_world(out / "world", recipe, seed)
    settings = CaptureSettings(shards=recipe.shards, fields=tuple(FIELDS), workers=1)
    return capture(CaptureRequest(TeacherSpec(str(TEACHER)), data, str(out / "cache"), settings, FIELDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/grids"))
    parser.add_argument("--seed", type=int, default=0)
    for name in ("captions", "train", "heldout", "shards"):
        parser.add_argument(f"--{name}", type=int, default=None)
    parser.add_argument("--wrong-answers", type=float, default=None, help="share of the training answers, 0 to 1")
    given = vars(parser.parse_args())
    out, seed = given.pop("out"), given.pop("seed")
    recipe = replace(DemoRecipe(defects=0), **{name: value for name, value in given.items() if value is not None})
    summary = make(out, recipe, seed)
    print(cache_table(summary["columns"], summary["rows"]))


if __name__ == "__main__":
    main()
