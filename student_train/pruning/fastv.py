"""FastV (arXiv 2403.06764): keep the vision tokens that the last prompt token looks at most, in the layer before, mean over heads.

A vision token behind the asking row (an image of a later turn, in training) is paid nothing and goes first. EPIC's released training asks
the last token of all, answers and padding included, which does not exist when a student answers.
"""

from __future__ import annotations

import torch

from student_train.pruning.seen import Seen, largest

NAME = "fastv"
PAPER = "FastV, arXiv 2403.06764"
WANTS = frozenset({"attention"})


def choose(seen: Seen, keep: int) -> torch.Tensor:
    """Indices into the sample's vision tokens, ``[keep]``."""
    return largest(seen.need("attention")[seen.vision], keep)
