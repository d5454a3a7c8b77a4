"""DART (arXiv 2502.11494): keep a few pivots and, for each, the vision tokens that resemble it least; duplicates go.

Pivots: the 4 vision and 4 prompt text tokens with the largest L1 norm of their keys in the layer before. Likeness: cosine of the hidden
states that enter the pruned layer, as the released code takes it (keys choose pivots, hidden states measure likeness).
"""

from __future__ import annotations

import torch

from student_train.pruning.seen import Seen, largest

NAME = "dart"
PAPER = "DART, arXiv 2502.11494"
WANTS = frozenset({"keys", "hidden"})
IMAGE_PIVOTS, TEXT_PIVOTS = 4, 4


def choose(seen: Seen, keep: int) -> torch.Tensor:
    """Indices into the sample's vision tokens, ``[keep]``: image pivots first, then every pivot's share, image pivots' before text ones'.

    Shares are equal, the first pivots' one larger where they do not divide. No token is taken twice.
    """
    norms = seen.need("keys").to(torch.float32).abs().sum(dim=1)
    states = torch.nn.functional.normalize(seen.need("hidden").to(torch.float32), dim=1)
    text = seen.prompt & ~seen.vision
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
