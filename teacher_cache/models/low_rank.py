"""A teacher's head in the basis of a sketch: all that training loads of a teacher whose hidden states are sketched."""

from __future__ import annotations

from functools import cached_property

import torch

from teacher_cache.models.head import head_logits
from teacher_cache.signal_records import Sketch


class LowRankHead:
    """ẑ = y·W′ᵀ + b + m·1 (W′, b: the head and the mean hidden state's logits in the sketch's basis).

    Attributes:
        weight: W′ ``[V, r]``, columns centred over the vocabulary: bfloat16 as stored, float32 on a CPU.
        bias: b float32 ``[V]``, centred too.
        step: Δ of the sketch's coefficients, which says how far from the teacher's they may be; None: not known.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, step: float | None = None):
        self.weight, self.bias, self.step = weight, bias, step

    def to(self, device: torch.device) -> LowRankHead:
        """On the device; in float32 on a CPU, whose half-precision products are slow or inexact."""
        weight = self.weight.to(device)
        weight = weight.to(torch.float32) if device.type == "cpu" else weight
        return LowRankHead(weight, self.bias.to(device), self.step)

    def logits(self, sketch: Sketch) -> torch.Tensor:
        """float32 ``[R, V]``."""
        product = head_logits(sketch.coefficients.to(self.weight.dtype), self.weight)
        return product.add_(self.bias).add_(sketch.mean_logit[:, None])

    def at(self, columns: torch.Tensor) -> LowRankHead:
        """The head of the tokens ``columns`` int64 ``[m]`` alone."""
        return LowRankHead(self.weight[columns], self.bias[columns], self.step)

    def logits_at(self, sketch: Sketch, ids: torch.Tensor) -> torch.Tensor:
        """float32 ``[R, K]``: the logits of the tokens ``ids`` ``[R, K]`` only."""
        rows = self.weight[ids].to(torch.float32)
        product = torch.einsum("rkd,rd->rk", rows, sketch.coefficients.to(torch.float32))
        return product + self.bias[ids] + sketch.mean_logit[:, None]

    def gram(self, sketch: Sketch) -> torch.Tensor:
        """Y·Yᵀ float32 ``[R, R]`` of the raw logits without touching V: terms of y with m vanish, since W′ and b are centred."""
        y, m = sketch.coefficients.to(torch.float32), sketch.mean_logit
        u = y @ self._weight_bias
        whole = (y @ self._weight_gram) @ y.T + u[:, None] + u[None, :] + self.bias.square().sum()
        return whole + len(self.bias) * torch.outer(m, m)

    @cached_property
    def _weight_gram(self) -> torch.Tensor:
        wide = self.weight.to(torch.float32)
        return wide.T @ wide

    @cached_property
    def _weight_bias(self) -> torch.Tensor:
        return self.weight.to(torch.float32).T @ self.bias
