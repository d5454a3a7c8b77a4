"""``kdcli export --check``: the exported folder in a fresh process of plain transformers, against the student that it was made of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from pipelines.export import loaded
from teacher_cache.errors import KdcliError
from teacher_cache.preparing.chat import chat_of
from teacher_cache.records import Turn
from teacher_cache.sources.usable_samples import PLACEHOLDER

TOLERANCE = 1e-5
"""Of the largest difference of logits, relative to the largest logit (or 1): both sides compute in float32."""
SIZES = ((320, 200), (90, 240), (500, 500))
QUESTIONS = (
    (f"{PLACEHOLDER}\nWhat is in the picture?", 1),
    ("Which of them is larger?", 0),
    (f"{PLACEHOLDER} and?", 1),
)
TEXT_QUESTIONS = (("What is the capital of France?", 0), ("Which of them is larger?", 0), ("And?", 0))


def write_rows(folder: Path, processor: Any) -> list[dict[str, Any]]:
    """Three questions about made pictures of several sizes (a text-only one among them) as ``loaded.py`` reads them; of a model that
    reads text alone, as many without pictures."""
    draw = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    questions = TEXT_QUESTIONS if processor.image_processor is None else QUESTIONS
    for i, ((question, pictures), (width, height)) in enumerate(zip(questions, SIZES)):
        coarse = Image.fromarray(draw.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        names = [f"{i}.png"] * pictures
        if pictures:
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / names[0])
        chat = chat_of(processor)
        messages = chat.messages([Turn("user", question)]) if chat.owner.chat_template else []
        rows.append({"messages": messages, "text": f"USER: {question} ASSISTANT:", "images": names})
    (folder / "rows.json").write_text(json.dumps(rows))
    return rows


@torch.inference_mode()
def expected_logits(model: Any, processor: Any, rows: list[dict[str, Any]], folder: Path) -> dict[str, torch.Tensor]:
    """``{"0.input_ids": int64 [1, T], "0.logits": float32 [1, T, V], …}``"""
    expected = {}
    for i, row in enumerate(rows):
        inputs = loaded.row_inputs(processor, row, folder)
        expected[f"{i}.input_ids"] = inputs["input_ids"]
        expected[f"{i}.logits"] = model(**inputs).logits.contiguous()
    return expected


def check(folder: Path, rows: Path, expected: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the fresh process found; KdcliError where the folder is not the student.

    Args:
        rows: what ``write_rows`` filled.
    """
    save_file(expected, rows / "expected.safetensors")
    found = run_fresh(folder, rows)
    bound = TOLERANCE * max(1.0, found["largest"])
    if found["tokens"]:
        wanted, got = found["tokens"][0]
        raise KdcliError(
            f"{folder}: the exported processor writes {got} tokens, or other tokens, for a row of {wanted}"
        )
    if not found["difference"] <= bound:
        raise KdcliError(f"{folder}: logits differ by up to {found['difference']:.2e}, more than {bound:.2e}")
    if found["generated"] < 1:
        raise KdcliError(f"{folder}: generate gave no output")
    return {**found, "bound": bound}


def run_fresh(folder: Path, rows: Path) -> dict[str, Any]:
    """``loaded.py`` without the project on its path, offline, with a module folder of its own."""
    with tempfile.TemporaryDirectory() as modules:
        own = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules, "TOKENIZERS_PARALLELISM": "false"}
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        theirs, ours = os.pipe()  # it ends when nobody holds the other end any more
        try:
            done = subprocess.run(
                [sys.executable, "-P", loaded.__file__, str(folder.resolve()), str(rows.resolve())],
                env={**kept, **own},
                cwd=rows,
                stdin=theirs,
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            os.close(theirs)
            os.close(ours)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise KdcliError(f"{folder}: plain transformers cannot load it: {reason}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["project"]:
        raise KdcliError(f"{folder}: its code imports {', '.join(found['project'])}")
    return found
