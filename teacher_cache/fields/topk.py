"""``vision_topk`` and ``response_topk``: the k largest log-probs with their ids, and exact scalars of the rest.

Stored a row: ids int32 [R, K] and log-probs float16 or float32 [R, K] by falling log-prob; log_tail, log_z, mean_logit float32 [R].
The tail mass is stored as its own logarithm, never as 1 − Σp: on peaked rows the tail is 1e-6 and rounding would destroy it.
Alone it serves forward KL with a tail bucket at temperature 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.records import Prepared, TeacherOutput, TopK

FIELDS = ("vision_topk", "response_topk")
DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Params:
    k: int = 64
    value_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise KdcliError(f"top-k field: k must be at least 1, got {self.k}")
        if self.value_dtype not in DTYPES:
            raise KdcliError(f"top-k field: value_dtype must be one of {', '.join(DTYPES)}, got {self.value_dtype!r}")


class TopKField:
    version = 1

    def __init__(self, name: str, params: Params):
        self.name = name
        self.rows = name.removesuffix("_topk")
        self.params = asdict(params)
        self.wants = frozenset({f"topk.{self.rows}:{params.k}"})
        self._dtype = DTYPES[params.value_dtype]
        self._k = params.k

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        topk = output.topk[self.rows]
        return {
            "ids": topk.ids[:, : self._k].to(torch.int32),
            "log_probs": topk.log_probs[:, : self._k].to(self._dtype),
            "log_tail": topk.log_tail,
            "log_z": topk.log_z,
            "mean_logit": topk.mean_logit,
        }

    def decode(self, stored: dict[str, torch.Tensor]) -> TopK:
        """``TopK`` whose head is renormalised to exactly 1 − e^log_tail, so that rounded log-probs still sum to one."""
        if set(stored) != {"ids", "log_probs", "log_tail", "log_z", "mean_logit"}:
            raise CacheError(f"field {self.name}: a record holds {sorted(stored)}")
        log_probs = stored["log_probs"].to(torch.float32)
        log_tail = stored["log_tail"]
        log_head = torch.log(-torch.expm1(log_tail.clamp(max=-1e-38)))
        log_probs = log_probs - log_probs.logsumexp(dim=1, keepdim=True) + log_head[:, None]
        return TopK(stored["ids"].to(torch.int64), log_probs, log_tail, stored["log_z"], stored["mean_logit"])


def create(name: str, params: dict[str, Any]) -> TopKField:
    return TopKField(name, Params(**params))
