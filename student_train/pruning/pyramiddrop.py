"""PyramidDrop (arXiv 2410.17247), as its released code has it: three drops, before the layers at a quarter, half and three quarters.

Each ranks by the attention that layer itself would pay (its own norm and projections, on the states that enter it), mean over its heads,
of the last prompt token; in training the mean over the last prompt token of every turn, though a later turn's has seen the answers
before it. By default ⌊N/2⌋, ⌊N/4⌋ and ⌊N/8⌋ of N vision tokens are left. After a drop the tokens that stay are numbered anew, without gaps.

Ours, by choice: where the final count is given, the drops before it leave four times and twice as many; where K is given, the drops stand
at a quarter, half and three quarters of the layers from K on; several images are ranked together, of which the code knows the first alone.
"""

from __future__ import annotations

import torch

from student_train.pruning.seen import Seen, largest

NAME = "pyramiddrop"
PAPER = "PyramidDrop, arXiv 2410.17247"
WANTS = frozenset({"own_attention"})
EVERY_TURN = RENUMBERS = True
DEFAULT_LAYER = 0
STAGES = ((0.25, 4.0), (0.5, 2.0), (0.75, 1.0))
DEFAULT_KEPT = 0.125


def choose(seen: Seen, keep: int) -> torch.Tensor:
    """Indices into the sample's vision tokens, ``[keep]``."""
    return largest(seen.need("own_attention")[seen.vision], keep)
