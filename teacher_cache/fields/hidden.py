"""``vision_hidden`` and ``response_hidden``: post-final-norm hidden states h, with logits = W·h (W: the teacher's head).

Stored a row by the named codec (``bf16`` | ``int8`` | ``fp32``). Serves every logit loss over the full vocabulary at any temperature.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from teacher_cache.codecs import row_codec
from teacher_cache.records import Prepared, TeacherOutput

FIELDS = ("vision_hidden", "response_hidden")


@dataclass(frozen=True)
class Params:
    codec: str = "bf16"
    codec_version: int | None = None


class HiddenField:
    version = 1

    def __init__(self, name: str, params: Params):
        self.name = name
        self.rows = name.removesuffix("_hidden")
        self._codec = row_codec(params.codec, params.codec_version)
        self.params = asdict(params) | {"codec_version": self._codec.VERSION}
        self.wants = frozenset({f"hidden.{self.rows}"})

    def __reduce__(self) -> tuple[Any, ...]:
        return create, (
            self.name,
            dict(self.params),
        )  # a codec is a module, and those do not travel to worker processes

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        return self._codec.encode(output.hidden[self.rows])

    def decode(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 ``[R, D]``."""
        return self._codec.decode(stored)


def create(name: str, params: dict[str, Any]) -> HiddenField:
    return HiddenField(name, Params(**params))
