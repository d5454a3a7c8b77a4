"""Qwen-VL: the whole image at its own shape, a token for ``merge_size``² patches. Models with the same processor are recognised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from teacher_cache.families.family import Family, Size
from teacher_cache.records import View


class QwenVL(Family):
    model_types = ("qwen2_5_vl", "qwen3_vl")
    packs = True

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

    def packed_positions(self, model: Any, batch: Any) -> torch.Tensor:
        """int64 ``[4, B, T]``: places in the text, by which samples are kept apart, then M-RoPE's three of every sample alone."""
        text = batch.inputs["position_ids"]
        found = text.expand(4, *text.shape).clone()
        if "image_grid_thw" not in batch.inputs:
            return found
        flat, kinds = (batch.inputs[name].flatten() for name in ("input_ids", self.token_kinds))
        ids, types, mask = (flat.new_zeros(len(batch.spans), max(count for _, count in batch.spans)) for _ in range(3))
        for row, (start, count) in enumerate(batch.spans):
            ids[row, :count], mask[row, :count] = flat[start : start + count], 1
            types[row, :count] = kinds[start : start + count]
        alone, _ = model.get_rope_index(ids, types, batch.inputs["image_grid_thw"], attention_mask=mask)
        for row, (start, count) in enumerate(batch.spans):
            found[1:].flatten(1)[:, start : start + count] = alone[:, row, :count]
        return found


FAMILY = QwenVL()
