"""``relation``: the Gram matrix R = Y·Yᵀ of the raw vision logits Y (LLaVA-KD's RDist, arXiv 2410.16236, eq. 6).

Stored: the upper triangle, float16 of R / max|R| (entries overflow float16 otherwise; the loss is scale-free) and the scale in
float32: N·(N+1) bytes a row of N vision tokens. Off by default: hidden states or a sketch serve the same loss in far fewer bytes.
"""

from __future__ import annotations

from typing import Any

import torch

from teacher_cache.errors import CacheError
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.wants import Wants

FIELDS = ("relation",)


class RelationField:
    name = "relation"
    shape = ("vision", "vision")
    version = 1
    calibrated = False
    temperatures: tuple[float, ...] | None = None
    wants = Wants(gram=True)

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        gram = output.gram
        assert gram is not None, "the teacher was asked for gram"
        rows = gram.shape[0]
        scale = gram.abs().amax().clamp_min(1e-30) if rows else gram.new_ones(())
        upper = torch.triu_indices(rows, rows)
        return {
            "upper": (gram / scale)[upper[0], upper[1]].to(torch.float16),
            "scale": scale.reshape(1).to(torch.float32),
        }

    def decode(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 ``[R_vision, R_vision]``, symmetric."""
        values = stored["upper"].to(torch.float32) * stored["scale"]
        rows = round(((8 * values.numel() + 1) ** 0.5 - 1) / 2)
        if rows * (rows + 1) // 2 != values.numel():
            raise CacheError(f"field relation: {values.numel()} entries are not a triangle")
        gram = values.new_zeros(rows, rows)
        upper = torch.triu_indices(rows, rows)
        gram[upper[0], upper[1]] = values
        return gram + gram.triu(1).T


def create(name: str, params: dict[str, Any]) -> RelationField:
    if params:
        raise TypeError(f"unknown parameters {params}")
    return RelationField()
