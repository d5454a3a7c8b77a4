"""``attention``: what each text token pays each vision token of its row, in one decoder layer (Align-KD, arXiv 2412.01282: the first).

Probabilities after the softmax over *all* keys that a text token sees, so a row sums to at most 1 (what is left went to text). Text
tokens in the order of ``TextTokens``, vision tokens of all images one after the other; a text token before an image pays it exactly 0.

Stored: one byte a probability on a logarithmic scale (``codecs.probabilities``), ``[H, N, R_vision]`` as differences (modulo 256) of
neighbouring vision tokens, under zstd. Zeros cost next to nothing, the rest two thirds of a byte: ``heads = "each"`` makes by far the
largest field of a cache, ``heads = "mean"`` a fraction 1/H of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from teacher_cache.codecs import frame, probabilities
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.wants import Wants

FIELDS = ("attention",)
HEADS = ("each", "mean")
NAMES = {"coded", "shape"}
PAIR_BYTES = 0.7
"""Of a probability, under zstd: 0.68 on the shipped demo teacher at step 0.05, pairs of text before the image included."""


@dataclass(frozen=True)
class Params:
    """heads: ``each``, or their ``mean``. layer: of the decoder, counted from 0.

    step: of the logarithm of a probability: 0.05 is a relative error of at most 2.5 %, down to 3e-6, and 0 below.
    """

    heads: str = "each"
    layer: int = 0
    step: float = 0.05

    def __post_init__(self) -> None:
        if self.heads not in HEADS:
            raise KdcliError(f"attention field: heads must be one of {', '.join(HEADS)}, got {self.heads!r}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise KdcliError(f"attention field: layer must be a whole number from 0, got {self.layer!r}")
        if not 0.03 <= self.step <= 1:  # at 0.03 the symbols end at 5e-4, below it soon nowhere near an even share
            raise KdcliError(f"attention field: step must be in [0.03, 1], got {self.step}")


class AttentionField:
    name = "attention"
    shape = (None, "text", "vision")
    version = 1
    calibrated = False
    temperatures: tuple[float, ...] | None = None

    def __init__(self, params: Params):
        self.params: dict[str, Any] = asdict(params)
        self.wants = Wants(attention={params.layer: params.heads})
        self._given = params

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        attention = output.attention[self._given.layer]
        if self._given.heads == "mean":  # of heads already averaged by the teacher it changes nothing
            attention = attention.mean(dim=0, keepdim=True)
        symbols = probabilities.quantise(attention, self._given.step).numpy()
        differences = np.diff(symbols, axis=2, prepend=np.zeros_like(symbols[:, :, :1]))  # bytes: modulo 256
        coded = frame.compress(differences.tobytes())
        return {
            "coded": torch.from_numpy(np.frombuffer(coded, np.uint8).copy()),
            "shape": torch.tensor(attention.shape, dtype=torch.int32),
        }

    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float32 ``[H, N, R_vision]`` (H = 1: the mean); ``[H, N, 0]`` for text-only rows."""
        if set(stored) != NAMES or stored["shape"].shape != (3,) or stored["shape"].dtype != torch.int32:
            raise CacheError(f"field attention: a record holds {sorted(stored)}: run `kdcli cache verify`")
        shape = stored["shape"].tolist()
        size = shape[0] * shape[1] * shape[2]
        if min(shape) < 0 or size > frame.MOST_BYTES:
            raise CacheError(f"field attention: a record of shape {shape}: run `kdcli cache verify`")
        data = frame.decompress(stored["coded"].numpy().tobytes(), "field attention", most=size)
        if len(data) != size:
            raise CacheError(f"field attention: {len(data)} bytes are not of shape {shape}: run `kdcli cache verify`")
        differences = np.frombuffer(data, np.uint8).reshape(shape)
        symbols = torch.from_numpy(differences.cumsum(axis=2, dtype=np.uint8))
        return probabilities.dequantise(symbols, self._given.step)

    def coded_rows(self, vision: int, response: int, text: int) -> int:
        """Pairs of a text and a vision token: those of text before an image are zeros that cost nothing, and count all the same."""
        return vision * text

    def guess_bytes(self, vocabulary: int, heads: int) -> float:
        return PAIR_BYTES * (heads if self._given.heads == "each" else 1)


def create(name: str, params: dict[str, Any]) -> AttentionField:
    return AttentionField(Params(**params))
