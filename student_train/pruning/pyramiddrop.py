"""PyramidDrop (arXiv 2410.17247): three drops, at a quarter, half and three quarters of the layers from K on.

Each ranks by the last prompt token's attention in the layer before. By default 1/2, 1/4 and 1/8 of the original vision tokens are left.
Where the final count is given, the drops before it leave four times and twice as many.
"""

from __future__ import annotations

import torch

from student_train.pruning.seen import Seen, largest

NAME = "pyramiddrop"
PAPER = "PyramidDrop, arXiv 2410.17247"
WANTS = frozenset({"attention"})
STAGES = ((0.25, 4.0), (0.5, 2.0), (0.75, 1.0))
DEFAULT_KEPT = 0.125


def choose(seen: Seen, keep: int) -> torch.Tensor:
    """Indices into the sample's vision tokens, ``[keep]``."""
    return largest(seen.need("attention")[seen.vision], keep)
