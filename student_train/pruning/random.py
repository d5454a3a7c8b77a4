"""Vision tokens kept at random, each set with the same chance: what every other operator has to beat."""

from __future__ import annotations

import torch

from student_train.pruning.seen import Seen

NAME = "random"
PAPER = "EPIC, arXiv 2510.00515 (its baseline operator)"
WANTS: frozenset[str] = frozenset()


def choose(seen: Seen, keep: int) -> torch.Tensor:
    """Indices into the sample's vision tokens, ``[keep]``; drawn where the generator lives."""
    device = seen.generator.device if seen.generator is not None else "cpu"
    order = torch.randperm(int(seen.vision.sum()), generator=seen.generator, device=device)
    return order[:keep].to(seen.vision.device)
