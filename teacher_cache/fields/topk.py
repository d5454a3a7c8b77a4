"""``vision_topk`` and ``response_topk``: the k largest log-probs with their ids, the exact log tail mass and log Z.

Coded under calibrated frequencies (``topk_coded``): 12 to 20 bytes a row at k = 8. Records of the form ``plain`` are read, and no longer
written (``topk_plain``).

The tail mass is never stored as 1 − Σp: on peaked rows it is 1e-6, and rounding would destroy it. Its log odds are kept, since on flat rows
it is the head's mass that a rounded logarithm would destroy.
Alone it serves forward KL with a tail bucket at temperature 1; with a sketch of the hidden states, the full vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields.calibration import Calibration
from teacher_cache.fields.topk_coded import CodedTopK
from teacher_cache.fields.topk_plain import PlainTopK
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.signal_records import TopK
from teacher_cache.wants import Wants

FIELDS = ("vision_topk", "response_topk")
CODED = "coded"
VALUE_DTYPES = ("float16", "float32")
TAILS = ("exact", "inexact")


@dataclass(frozen=True)
class Params:
    """step: of the log-probs, in nats at p = 1.

    tail: ``inexact`` where the teacher told log-probs alone (vLLM's route ``logprobs``): the tail is 1 − Σp, and log Z is unknown (0 is
    stored), so such a field serves alone, never with a sketch.

    coding, value_dtype: parts of every description since there were other forms; they change nothing.
    """

    k: int = 64
    coding: str = CODED
    step: float = 1 / 64
    value_dtype: str = "float16"
    tail: str = "exact"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise KdcliError(f"top-k field: k must be at least 1, got {self.k}")
        if self.coding != CODED:
            raise KdcliError(
                f"top-k field: coding {self.coding!r} is no longer written: leave it out; coded records are smaller at the same KL"
            )
        for name, choices in (("value_dtype", VALUE_DTYPES), ("tail", TAILS)):
            if getattr(self, name) not in choices:
                raise KdcliError(
                    f"top-k field: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if not 0 < self.step <= 1:
            raise KdcliError(f"top-k field: step must be in (0, 1], got {self.step}")


class TopKField:
    version = 2
    calibrated = True
    settled_last: tuple[str, ...] = ()
    temperatures: tuple[float, ...] | None = (1.0,)

    def __init__(self, name: str, params: Params, calibration: Mapping[str, torch.Tensor] | None = None):
        self.name = name
        self.rows = name.removesuffix("_topk")
        self.params = asdict(params)
        if params.tail == "exact":
            del self.params["tail"]  # as descriptions always were
        self.wants = Wants(topk={self.rows: params.k})
        self.shape = (self.rows,)
        self._given, self._calibration = params, calibration
        self._coder = CodedTopK(name, params.k, params.step, calibration)

    def __reduce__(self) -> tuple[Any, ...]:
        return create, (self.name, dict(self.params), self._calibration)

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        return self._coder.encode(cut(output.topk[self.rows], self._given.k))

    def decode(self, stored: dict[str, torch.Tensor]) -> TopK:
        """``TopK`` whose head is renormalised to exactly 1 − e^log_tail, so that rounded log-probs still sum to one."""
        return self.decode_many([stored])[0]

    def decode_many(self, stored: Sequence[dict[str, torch.Tensor]]) -> list[TopK]:
        """Of several records, read and renormalised together."""
        joined, rows = self._coder.decode_many(stored)
        return list(map(TopK, *(column.split(rows) for column in vars(joined).values())))

    def fit(self, outputs: Sequence[TeacherOutput], head: torch.Tensor) -> Calibration:
        """Frequencies of ids and of all quantised numbers on the calibration rows."""
        topk = TopK.join([cut(one.topk[self.rows], self._given.k) for one in outputs])
        if not len(topk):
            raise KdcliError(
                f"calibration saw no {self.rows} rows: field {self.name} needs some: raise --calibration-rows, or leave it out"
            )
        return self._coder.fit(topk, len(head))

    def with_calibration(self, tensors: Mapping[str, torch.Tensor]) -> TopKField:
        return TopKField(self.name, self._given, tensors)

    def guess_bytes(self, vocabulary: int, heads: int) -> float:
        """By its k and the bits of an id: 15 at k = 8 and 78 at k = 50 for V = 32,768."""
        return 3.6 + self._given.k * (1.49 + (math.log2(vocabulary) - 15) / 8)


def cut(topk: TopK, k: int) -> TopK:
    """The ``k`` largest entries; what is cut joins the tail. One answer of the teacher may serve fields of several k."""
    if topk.ids.shape[1] <= k:
        return topk
    log_tail = torch.logaddexp(topk.log_tail, topk.log_probs[:, k:].logsumexp(dim=1))
    return TopK(topk.ids[:, :k], topk.log_probs[:, :k], log_tail, topk.log_z)


def create(name: str, params: dict[str, Any], calibration: Mapping[str, torch.Tensor] | None = None) -> TopKField:
    return TopKField(name, Params(**params), calibration)


def reader(name: str, params: Mapping[str, Any]) -> PlainTopK | None:
    """Of a description of another form; CacheError naming one that is not read."""
    if params.get("coding") in (None, CODED):
        return None
    if params["coding"] != "plain":
        raise CacheError(
            f"field {name}: its coding {params['coding']!r} is not readable: capture it again with `kdcli cache drop-field` and "
            "`kdcli cache add-field`"
        )
    return PlainTopK(name, params)
