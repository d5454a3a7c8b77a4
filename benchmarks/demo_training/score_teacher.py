"""Scores a shipped teacher folder on held-out questions: ``python -m benchmarks.demo_training.score_teacher``.

Writes ``scores.json`` beside the weights and prints one line a family, with what two blind baselines reach.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from benchmarks.demo_training import ASSETS
from benchmarks.demo_training.model import parameter_count
from benchmarks.demo_training.score import score_table
from pipelines.demo.questions import IMAGE_FAMILIES, SHAPE_FAMILIES

AVERAGE = "average"
TARGETS = {AVERAGE: 0.9, **dict.fromkeys(SHAPE_FAMILIES, 0.9), "charts": 0.75, "reading": 0.75}
COLUMNS = {
    "teacher": "the shipped weights, in fp32 arithmetic",
    "majority": "always the family's most frequent training answer",
    "blank_image": "the same teacher, shown an empty picture",
}


def write_scores(folder: Path, per_family: int) -> dict:
    """Scores what was shipped (not what was trained), writes and returns ``scores.json``."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    started = time.monotonic()
    table = score_table(model, per_family)
    average = {column: sum(table[f][column] for f in IMAGE_FAMILIES) / len(IMAGE_FAMILIES) for column in COLUMNS}
    reached = {**table, AVERAGE: average}
    scores = {
        "metric": "exact match under greedy decoding, single questions about held-out pictures",
        "columns": COLUMNS,
        "average_over_image_families": average,
        "families": table,
        "targets": TARGETS,
        "missed_targets": [family for family, target in TARGETS.items() if reached[family]["teacher"] < target],
        "note": "text questions come from small closed sets that training covers: that line measures memory",
        "parameters": parameter_count(model),
        "scoring_seconds": round(time.monotonic() - started, 1),
    }
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    for family, row in reached.items():
        print(f"{family:16s} " + "  ".join(f"{column} {row[column]:.3f}" for column in COLUMNS))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "teacher")
    parser.add_argument("--questions", type=int, default=200, help="held-out questions a family")
    arguments = parser.parse_args()
    write_scores(arguments.model, arguments.questions)


if __name__ == "__main__":
    main()
