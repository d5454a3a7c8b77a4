"""Top-k as tensors: int32 ids, float16 or float32 log-probs, float32 scalars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from teacher_cache.errors import CacheError
from teacher_cache.records import TopK

DTYPES = {"float16": torch.float16, "float32": torch.float32}
NAMES = ("ids", "log_probs", "log_tail", "log_z")


class PlainTopK:
    """value_dtype: of the log-probs."""

    def __init__(self, name: str, value_dtype: str):
        self.name, self._dtype = name, DTYPES[value_dtype]

    def encode(self, topk: TopK) -> dict[str, torch.Tensor]:
        columns = (topk.ids.to(torch.int32), topk.log_probs.to(self._dtype), topk.log_tail, topk.log_z)
        return dict(zip(NAMES, columns))

    def decode(self, stored: Mapping[str, torch.Tensor]) -> Sequence[torch.Tensor]:
        if set(stored) != set(NAMES):
            raise CacheError(f"field {self.name}: a record holds {sorted(stored)}")
        ids, log_probs, log_tail, log_z = (stored[name] for name in NAMES)
        return ids, log_probs, log_tail, log_mass_beside(log_tail), log_z


def log_mass_beside(log_mass: torch.Tensor) -> torch.Tensor:
    """log(1 − e^x)."""
    return torch.log(-torch.expm1(log_mass.clamp(max=-1e-38)))
