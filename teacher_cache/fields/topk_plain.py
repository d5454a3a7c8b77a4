"""Top-k as tensors (int32 ids, float16 or float32 log-probs, float32 scalars): read of caches that have it, no longer written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields.topk_coded import normalised
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.signal_records import TopK
from teacher_cache.wants import Wants

NAMES = ("ids", "log_probs", "log_tail", "log_z")


class PlainTopK:
    version = 2
    calibrated = False
    temperatures: tuple[float, ...] | None = (1.0,)

    def __init__(self, name: str, params: Mapping[str, Any]):
        self.name, self.params = name, dict(params)
        self.wants = Wants(topk={name.removesuffix("_topk"): params["k"]})
        self.shape = tuple(self.wants.topk)

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        raise KdcliError(
            f"field {self.name}: coding 'plain' is no longer written: capture it again with `kdcli cache drop-field` and "
            "`kdcli cache add-field`"
        )

    def decode(self, stored: Mapping[str, torch.Tensor]) -> TopK:
        """As ``TopKField.decode``."""
        if set(stored) != set(NAMES):
            raise CacheError(f"field {self.name}: a record holds {sorted(stored)}")
        ids, log_probs, log_tail, log_z = (stored[name] for name in NAMES)
        log_head = torch.log(-torch.expm1(log_tail.clamp(max=-1e-38)))
        return normalised(ids, log_probs, log_tail, log_head, log_z)
