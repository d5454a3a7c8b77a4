"""``affinity``: cosine of every vision hidden state with every text hidden state (EM-KD's VLAD, arXiv 2511.21106).

Stored: int8 ``[R_vision, N]`` of 127·cos, over *all* text tokens in the order of ``TextTokens`` (roles are in ``samples``, so the
method picks response tokens or all). A text-only row stores ``[0, N]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import normalize

from teacher_cache.records import Prepared, TeacherOutput

FIELDS = ("affinity",)


class AffinityField:
    name = "affinity"
    version = 1
    wants = frozenset({"hidden.vision", "hidden.text"})

    def __init__(self) -> None:
        self.params: dict[str, Any] = {"layout": "dense"}

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        vision = normalize(output.hidden["vision"].to(torch.float32), dim=1)
        text = normalize(output.hidden["text"].to(torch.float32), dim=1)
        return {"cosine": (vision @ text.T * 127).round().to(torch.int8)}

    def decode(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 ``[R_vision, N]`` in [-1, 1], absolute error at most 1/254."""
        return stored["cosine"].to(torch.float32) / 127


def create(name: str, params: dict[str, Any]) -> AffinityField:
    if params not in ({}, {"layout": "dense"}):
        raise TypeError(f"unknown parameters {params}")
    return AffinityField()
