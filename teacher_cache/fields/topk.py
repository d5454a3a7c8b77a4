"""``vision_topk`` and ``response_topk``: the k largest log-probs with their ids, the exact log tail mass and log Z.

Codings:

- ``coded`` (default, ``topk_coded``): under calibrated frequencies, 12 to 20 bytes a row at k = 8.
- ``packed`` (``topk_packed``): no calibration; ids bit-packed, log-probs in uniform steps under zstd: 2 to 3·k + 8 bytes a row.
- ``plain`` (``topk_plain``): int32 ids, float16 or float32 log-probs, float32 scalars: 6·k + 8 bytes a row.

The tail mass is never stored as 1 − Σp: on peaked rows it is 1e-6, and rounding would destroy it. ``plain`` and ``packed`` keep its
logarithm, ``coded`` its log odds, since on flat rows it is the head's mass that a rounded logarithm would destroy.
Alone it serves forward KL with a tail bucket at temperature 1; with a sketch of the hidden states, the full vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch

from teacher_cache.errors import KdcliError
from teacher_cache.fields.calibration import Calibration
from teacher_cache.fields.topk_coded import CodedTopK
from teacher_cache.fields.topk_packed import PackedTopK
from teacher_cache.fields.topk_plain import DTYPES, PlainTopK
from teacher_cache.records import Prepared, TeacherOutput, TopK
from teacher_cache.wants import Wants

FIELDS = ("vision_topk", "response_topk")
CODINGS = ("coded", "packed", "plain")
TAILS = ("exact", "inexact")


@dataclass(frozen=True)
class Params:
    """step: of the log-probs, in nats (``coded``: at p = 1). value_dtype: of the log-probs (``plain``).

    tail: ``inexact`` where the teacher told log-probs alone (vLLM's route ``logprobs``): the tail is 1 − Σp, and log Z is unknown (0 is
    stored), so such a field serves alone, never with a sketch.
    """

    k: int = 64
    coding: str = "coded"
    step: float = 1 / 64
    value_dtype: str = "float16"
    tail: str = "exact"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise KdcliError(f"top-k field: k must be at least 1, got {self.k}")
        for name, choices in (("value_dtype", tuple(DTYPES)), ("coding", CODINGS), ("tail", TAILS)):
            if getattr(self, name) not in choices:
                raise KdcliError(
                    f"top-k field: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if not 0 < self.step <= 1:
            raise KdcliError(f"top-k field: step must be in (0, 1], got {self.step}")


class Head(NamedTuple):
    """What a coding reads back: ids ``[R, K]``, log-probs ``[R, K]`` up to a constant a row, log mass of tail and head, log Z ``[R]``."""

    ids: torch.Tensor
    log_probs: torch.Tensor
    log_tail: torch.Tensor
    log_head: torch.Tensor
    log_z: torch.Tensor


class Coding(Protocol):
    """One way to store a ``TopK``."""

    def encode(self, topk: TopK) -> dict[str, torch.Tensor]: ...

    def decode(self, stored: Mapping[str, torch.Tensor]) -> Sequence[torch.Tensor]:
        """The columns of ``Head``."""
        ...


def coding_of(name: str, params: Params, calibration: Mapping[str, torch.Tensor] | None) -> Coding:
    if params.coding == "coded":
        return CodedTopK(name, params.k, params.step, calibration)
    if params.coding == "packed":
        return PackedTopK(name, params.k, params.step)
    return PlainTopK(name, params.value_dtype)


class TopKField:
    version = 2
    settled_last: tuple[str, ...] = ()
    temperatures: tuple[float, ...] | None = (1.0,)

    def __init__(self, name: str, params: Params, calibration: Mapping[str, torch.Tensor] | None = None):
        self.name = name
        self.rows = name.removesuffix("_topk")
        self.params = asdict(params)
        if params.tail == "exact":
            del self.params["tail"]  # as descriptions always were
        self.wants = Wants(topk={self.rows: params.k})
        self.calibrated = params.coding == "coded"
        self._given, self._calibration = params, calibration
        self._coding = coding_of(name, params, calibration)

    def __reduce__(self) -> tuple[Any, ...]:
        return create, (self.name, dict(self.params), self._calibration)

    def encode(self, prepared: Prepared, output: TeacherOutput) -> dict[str, torch.Tensor]:
        return self._coding.encode(cut(output.topk[self.rows], self._given.k))

    def decode(self, stored: dict[str, torch.Tensor]) -> TopK:
        """``TopK`` whose head is renormalised to exactly 1 − e^log_tail, so that rounded log-probs still sum to one."""
        return self._normalised(Head(*self._coding.decode(stored)))

    def decode_many(self, stored: Sequence[dict[str, torch.Tensor]]) -> list[TopK]:
        """Of several records; those of a coding that reads them together are renormalised together."""
        if not isinstance(self._coding, CodedTopK):
            return [self.decode(one) for one in stored]
        columns, rows = self._coding.decode_many(stored)
        joined = self._normalised(Head(*columns))
        return list(map(TopK, *(column.split(rows) for column in vars(joined).values())))

    @staticmethod
    def _normalised(head: Head) -> TopK:
        log_probs = head.log_probs.to(torch.float32)
        log_probs = log_probs - log_probs.logsumexp(dim=1, keepdim=True) + head.log_head[:, None]
        return TopK(head.ids.to(torch.int64), log_probs, head.log_tail, head.log_z)

    def fit(self, outputs: Sequence[TeacherOutput], head: torch.Tensor) -> Calibration:
        """Frequencies of ids and of all quantised numbers on the calibration rows."""
        topk = TopK.join([cut(one.topk[self.rows], self._given.k) for one in outputs])
        if not len(topk):
            raise KdcliError(f"calibration saw no {self.rows} rows: field {self.name} needs some; use coding = 'plain'")
        return CodedTopK(self.name, self._given.k, self._given.step, None).fit(topk, len(head))

    def with_calibration(self, tensors: Mapping[str, torch.Tensor]) -> TopKField:
        return TopKField(self.name, self._given, tensors)


def cut(topk: TopK, k: int) -> TopK:
    """The ``k`` largest entries; what is cut joins the tail. One answer of the teacher may serve fields of several k."""
    if topk.ids.shape[1] <= k:
        return topk
    log_tail = torch.logaddexp(topk.log_tail, topk.log_probs[:, k:].logsumexp(dim=1))
    return TopK(topk.ids[:, :k], topk.log_probs[:, :k], log_tail, topk.log_z)


def create(name: str, params: dict[str, Any], calibration: Mapping[str, torch.Tensor] | None = None) -> TopKField:
    return TopKField(name, Params(**params), calibration)
