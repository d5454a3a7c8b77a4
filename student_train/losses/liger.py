"""Liger-Kernel's fused head and cross-entropy, for stages whose only loss on response tokens is cross-entropy (extra ``liger``, CUDA).

Its kernel writes each chunk's gradient over its logits in one pass. The logits have the compute dtype: under bf16 they are rounded
before the softmax, where our own chunks keep float32.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from teacher_cache.errors import KdcliError


def check_liger(device: torch.device) -> None:
    """KdcliError where ``use_liger_kernel`` cannot be had: no CUDA device, or no package."""
    if device.type != "cuda":
        raise KdcliError(f"use_liger_kernel needs a CUDA device, this run is on {device.type}: leave it out")
    if find_spec("liger_kernel") is None:
        raise KdcliError("use_liger_kernel needs the package liger-kernel: pip install 'kdcli[liger]', or leave it out")


def fused_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, cap: float | None = None
) -> torch.Tensor:
    """Σ_rows −log p_s(label), float32 scalar with gradient to both sides; hidden ``[R, D]``, head ``[V, D]``, labels ``[R]``.

    cap: of logits c · tanh(h·headᵀ / c).

    The head's gradient is summed over chunks in float32.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

    ignored, z_loss, smoothing = -100, 0.0, 0.0
    weight = head.to(hidden.dtype)
    summed = Fused.apply(
        hidden, weight, labels, None, None, ignored, z_loss, smoothing, "sum", cap, False, torch.float32
    )
    return summed[0].to(torch.float32)
