"""Top-k without calibration: ids bit-packed (``codecs.ids``), log-probs in uniform steps under zstd, exact scalars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from teacher_cache.codecs import frame, log_probs
from teacher_cache.codecs.ids import RankOrder
from teacher_cache.errors import CacheError
from teacher_cache.fields.topk_plain import log_mass_beside
from teacher_cache.records import TopK

NAMES = {"ids", "log_probs", "scalars"}
SIZES = 8
"""Bytes before the packed ids: K and a bound of the ids, int32 each."""


class PackedTopK:
    """Members: ``ids`` uint8 (sizes, then ⌈log2 bound⌉ bits an id), ``log_probs`` uint8 (a zstd frame), ``scalars`` float32 ``[2, R]``."""

    def __init__(self, name: str, k: int, step: float):
        self.name, self.k, self._step = name, k, step

    def encode(self, topk: TopK) -> dict[str, torch.Tensor]:
        bound = int(topk.ids.max()) + 1 if topk.ids.numel() else 1
        sizes = torch.tensor([topk.ids.shape[1], bound], dtype=torch.int32).view(torch.uint8)
        values = log_probs.encode(topk.log_probs.clamp_max(0.0), self._step)  # all the mass may round to above it
        framed = np.frombuffer(frame.compress(values.numpy().tobytes()), np.uint8)
        return {
            "ids": torch.cat([sizes, RankOrder.encode(topk.ids, bound)]),
            "log_probs": torch.from_numpy(framed.copy()),
            "scalars": torch.stack([topk.log_tail, topk.log_z]).to(torch.float32),
        }

    def decode(self, stored: Mapping[str, torch.Tensor]) -> Sequence[torch.Tensor]:
        if set(stored) != NAMES or stored["scalars"].ndim != 2 or len(stored["ids"]) < SIZES:
            raise CacheError(f"field {self.name}: a record holds {sorted(stored)}: run `kdcli cache verify`")
        log_tail, log_z = stored["scalars"]
        k, bound = stored["ids"][:SIZES].clone().view(torch.int32).tolist()
        if not 0 <= k <= self.k or bound < 1:
            raise CacheError(f"field {self.name}: a record of {k} entries per row: run `kdcli cache verify`")
        rows = len(log_tail)
        ids = RankOrder.decode(stored["ids"][SIZES:], rows, k, bound)
        most = rows * (6 + 5 * k)  # every value escaped
        values = frame.decompress(stored["log_probs"].numpy().tobytes(), f"field {self.name}", most=most)
        falling = log_probs.decode(torch.from_numpy(np.frombuffer(values, np.uint8).copy()), rows, k, self._step)
        return ids, falling, log_tail, log_mass_beside(log_tail), log_z
