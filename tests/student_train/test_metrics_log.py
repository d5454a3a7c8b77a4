"""What a step says of its rows and its time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_a_step_counts_what_both_sides_read(
    open_stage: Callable[..., Any], tiny_cache: Path, coarse_student: Path, tmp_path: Path
) -> None:
    """Rows with and without an image, nine vision tokens an image for the student where the teacher has 36."""
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "max_steps": 2}
    trainer, batches_from = open_stage(tiny_cache, "SFT", parts=("sft",), method="sft", student=coarse_student, **sizes)
    batches = next(iter(batches_from(0)))[1]
    trainer.train(batches_from)
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    first = lines[0]
    with_images = sum(bool(count) for one in batches for count in one.batch.counts["vision"])
    assert first["samples"] == 9 and 0 < with_images <= first["images"]
    assert first["vision_tokens"] == sum(sum(one.batch.counts["vision"]) for one in batches) == 9 * first["images"]
    assert first["cached_vision_tokens"] == 36 * first["images"]
    assert first["tokens"] == sum(int(one.batch.inputs["attention_mask"].sum()) for one in batches)
    assert all(one["seconds"] > 0 and one["data_seconds"] >= 0 for one in lines)
    assert "peak_memory_bytes" not in first, "nobody counts the bytes of a CPU"
