"""Rows turned by a fixed orthogonal map before they are rounded, and turned back after (no codec itself: it has no ``NAME``).

In every large model a few dimensions of a hidden state are ten to sixty times the others. A step that is wide enough for them rounds all
others to nothing. After the map every dimension holds a share of all of them, so that one step fits all. y = Q_m ⊗ H_p · (σ ⊙ x) for
D = m·p, p the largest power of two that divides D: σ signs of SHAKE-256, H_p the Hadamard matrix over √p, which holds no number but ±1/√p,
Q_m the cosine transform of order m, made in float64. So it is the same map on every machine, and nothing of it is stored.

The rows of a record share a mean, half of their energy, that is stored once where they are many: as a row of its own, first, by the same
codec, and what follows is less that row as it will be read.

On a real language model (SmolLM2-135M, D = 576; benchmarks/rotation.py) KL(p‖p̂) of int8 goes from 0.0174 to 0.0002 nats in records of 64
rows and 0.0004 in records of 8, of int4 from 0.67 to 0.041 and 0.093, at a hundredth more bytes. One core turns 1,000 rows of D = 3,584 in
some 30 ms, and back in 12.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from types import ModuleType

import numpy as np
import torch

from teacher_cache.errors import KdcliError

SEED = b"kdcli rotation 1"
"""Another one is another codec version."""
MANY = 16
"""Rows from which on their mean is stored: a sixteenth more bytes at most."""

LARGEST_ORDER = 2047
"""Of the cosine transform, a matrix of its square."""


def encode(rows: torch.Tensor, plain: ModuleType) -> dict[str, torch.Tensor]:
    """``[R, D]`` turned and rounded by ``plain``, on the rows' device; KdcliError where a row is no number.

    S rows are stored: R, and one more, their mean, from ``MANY`` on. S is never 16, so a reader knows by S alone.
    """
    if not rows.is_meta and not torch.isfinite(rows).all():
        raise KdcliError("hidden states hold NaN or infinity")
    turned = rotate(rows.to(torch.float32))
    if len(turned) >= MANY:
        first = turned.mean(dim=0, keepdim=True)
        turned = torch.cat([first, turned - plain.decode(plain.encode(first))])
    return plain.encode(turned)


def decode(stored: dict[str, torch.Tensor], plain: ModuleType) -> torch.Tensor:
    """float32 ``[R, D]``."""
    turned = plain.decode(stored)
    if len(turned) > MANY:
        turned = turned[1:] + turned[:1]
    return rotate_back(turned)


def rotate(rows: torch.Tensor) -> torch.Tensor:
    """float32 ``[R, D]`` → ``[R, D]``, lengths kept."""
    if not rows.numel():
        return rows
    signs, cosine, left, right = _maps(rows.shape[1], rows.device)
    x = (rows * signs).reshape(len(rows), len(cosine), len(left), len(right))
    return (cosine @ (left @ (x @ right)).flatten(2)).reshape(rows.shape)


def rotate_back(rows: torch.Tensor) -> torch.Tensor:
    """The inverse of ``rotate``."""
    if not rows.numel():
        return rows
    signs, cosine, left, right = _maps(rows.shape[1], rows.device)
    x = (cosine.T @ rows.reshape(len(rows), len(cosine), -1)).unflatten(2, (len(left), len(right)))
    return (left @ (x @ right)).reshape(rows.shape) * signs


@lru_cache(maxsize=8)
def _maps(width: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """float32 σ ``[D]``, Q_m, and the two Hadamard matrices of roots of p whose Kronecker product is H_p (each its own inverse)."""
    power = (width & -width).bit_length() - 1
    order = width >> power
    if order > LARGEST_ORDER:  # no model's, but a damaged record's, whose matrix would fill the memory
        raise KdcliError(f"rows of width {width} cannot be rotated: {order} is its largest odd factor; use codec bf16")
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(SEED).digest(-(-width // 8)), np.uint8))[:width]
    wave, place = np.arange(order)[:, None], np.arange(order)[None]
    cosine = np.sqrt(2 / order) * np.cos(math.pi * (place + 0.5) * wave / order)
    cosine[0] = math.sqrt(1 / order)
    made = (1.0 - 2.0 * bits, cosine, _hadamard(power // 2), _hadamard(power - power // 2))
    return tuple(torch.tensor(one, dtype=torch.float32, device=device) for one in made)


def _hadamard(power: int) -> np.ndarray:
    """Over the root of its order, 2^power."""
    made = np.ones((1, 1))
    for _ in range(power):
        made = np.block([[made, made], [made, -made]])
    return made / math.sqrt(len(made))
