"""``vision_features``: what the language model is given at its vision tokens, the projector's output (Align-KD, arXiv 2412.01282).

Read off the input of the first decoder layer, so that whatever a family does between projector and language model is in it. Codecs as
for hidden states: ``bf16``, ``fp32``, ``int8``, ``int4``; no head is needed to read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from teacher_cache.codecs import encode_rows, row_codec, row_codecs
from teacher_cache.errors import CacheError
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.wants import Wants

FIELDS = ("vision_features",)


@dataclass(frozen=True)
class Params:
    """codec: of the rows. codec_version: None for the newest."""

    codec: str = "bf16"
    codec_version: int | None = None

    def __post_init__(self) -> None:
        if self.codec not in row_codecs():
            raise CacheError(f"unknown codec {self.codec!r} of vision_features: choose from {', '.join(row_codecs())}")


class VisionFeatures:
    name = "vision_features"
    shape = ("vision", "width")
    version = 1
    calibrated = False
    temperatures: tuple[float, ...] | None = None
    wants = Wants(features=True)

    def __init__(self, params: Params):
        self._codec = row_codec(params.codec, params.codec_version)
        self.params: dict[str, Any] = {"codec": params.codec, "codec_version": self._codec.VERSION}

    def __reduce__(self) -> tuple[Any, ...]:
        return create, (self.name, dict(self.params))

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        assert output.features is not None, "the teacher was asked for features"
        return encode_rows(self._codec, output.features, output.device)

    def decode(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 ``[R_vision, D]``."""
        return self._codec.decode(stored)


def create(name: str, params: dict[str, Any]) -> VisionFeatures:
    return VisionFeatures(Params(**params))
