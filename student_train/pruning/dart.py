"""DART (arXiv 2502.11494): keep a few pivots and, for each, the vision tokens that resemble it least; duplicates go.

As EPIC's released code has it. Pivots: the 4 vision tokens, and of the text behind the image the 4, with the largest L1 norm of their
keys in the layer before. Likeness: cosine of the states that enter the pruned layer after the language model's last norm (keys choose
pivots, states measure likeness). A fraction r removed of N tokens leaves the 4 image pivots and ⌊(1 − r)·N / 8⌋ tokens for each of the 8.

Ours: text pivots are prompt tokens (the code's training takes answers too); the pivots' order is fixed (the code's is that of a Python
set of their places, which decides who chooses first); where there are fewer pivots, the others' shares are larger; a count that is given
is exact.
"""

from __future__ import annotations

import torch

from student_train.pruning.seen import Seen, largest

NAME = "dart"
PAPER = "DART, arXiv 2502.11494"
WANTS = frozenset({"keys", "normed"})
IMAGE_PIVOTS, TEXT_PIVOTS = 4, 4


def kept(vision: int, removed: float) -> int:
    """Tokens that stay of ``vision``, at most all of them."""
    pivots = IMAGE_PIVOTS + TEXT_PIVOTS
    return min(vision, pivots * int((1 - removed) * vision / pivots) + IMAGE_PIVOTS)


def choose(seen: Seen, keep: int) -> torch.Tensor:
    """Indices into the sample's vision tokens, ``[keep]``: image pivots first, then every pivot's share, image pivots' before text ones'.

    Shares are equal, the first pivots' one larger where they do not divide. No token is taken twice.
    """
    norms = seen.need("keys").to(torch.float32).abs().sum(dim=1)
    states = torch.nn.functional.normalize(seen.need("normed").to(torch.float32), dim=1)
    text = seen.prompt & ~seen.vision & (seen.vision.cumsum(dim=0) > 0)
    image_pivots = largest(norms[seen.vision], min(IMAGE_PIVOTS, keep))
    text_pivots = largest(norms[text], TEXT_PIVOTS)
    vision = states[seen.vision]
    likeness = torch.cat([vision[image_pivots], states[text][text_pivots]]) @ vision.T  # [pivots, N]
    chosen = [image_pivots]
    free = torch.ones(len(vision), dtype=torch.bool, device=vision.device)
    free[image_pivots] = False
    share, more = divmod(keep - len(image_pivots), len(likeness))
    for pivot, row in enumerate(likeness):
        taken = largest(-row.masked_fill(~free, torch.inf), share + (pivot < more))
        free[taken] = False
        chosen.append(taken)
    return torch.cat(chosen)
