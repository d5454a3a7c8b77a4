"""Float comparisons whose tolerance follows the size of what is compared.

Kernels of another processor add in another order: a sum of terms of size s is off by some 1e-16·s, or 1e-7·s in float32, however small
the sum itself is. An absolute tolerance says nothing of s, and a relative one nothing of a result that is nearly 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, rel: float, of: float | None = None, what: str = "") -> None:
    """Every entry within ``rel`` of the largest magnitude of ``theirs``, or of ``of``, the size of what was added up."""
    assert ours.shape == theirs.shape, what
    if not theirs.numel():
        return
    size = float(theirs.detach().abs().max()) if of is None else of
    worst = float((ours.detach() - theirs.detach()).abs().max())
    assert worst <= rel * size, f"{what}: {worst:.3g} apart, {worst / size if size else 0:.3g} of {size:.3g}"


def assert_all_close(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], rel: float) -> None:
    """Tensors of one computation, as the gradients of one loss: each within ``rel`` of the largest entry of all of them."""
    size = max(float(one.detach().abs().max()) for one in theirs if one.numel())
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(one, other, rel, size, f"tensor {number}")


def equal_tensors(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether all entries are the same; NaN, which stands for what is not stored, is as NaN."""
    return ours.shape == theirs.shape and bool(torch.isclose(ours, theirs, rtol=0, atol=0, equal_nan=True).all())
