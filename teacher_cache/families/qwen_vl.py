"""Qwen-VL: the whole image at its own shape, a token for ``merge_size``² patches. Models with the same processor are recognised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from teacher_cache.families.family import Family, Size
from teacher_cache.records import View


class QwenVL(Family):
    model_types = ("qwen2_5_vl", "qwen3_vl")

    def recognises(self, processor: Any, inputs: Mapping[str, Any]) -> bool:
        return "image_grid_thw" in inputs

    def views(
        self, config: Any, processor: Any, sizes: Sequence[Size], inputs: Mapping[str, Any], tokens: int
    ) -> list[list[View]]:
        merge = processor.image_processor.merge_size
        grids = inputs["image_grid_thw"].tolist()
        return [
            [View((0, 0, *size), (rows // merge, columns // merge))] for size, (_, rows, columns) in zip(sizes, grids)
        ]


FAMILY = QwenVL()
