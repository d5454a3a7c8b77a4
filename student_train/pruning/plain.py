"""The same pruning written down plainly, for tests: one sample, no padding, no hooks, whole attention maps, choices token by token.

The model must run eager attention (the only one that shows its probabilities).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from student_train.pruning import Pruning
from student_train.pruning.dart import IMAGE_PIVOTS, TEXT_PIVOTS


@dataclass
class Ranked:
    """One sample at a depth. rows: input rows still there. vision, prompt: by input row. attention: of the asking row, by place."""

    rows: list[int]
    vision: list[bool]
    asking: int
    attention: list[float]
    norms: list[float]
    states: torch.Tensor
    generator: torch.Generator | None


def pruned_states(
    model: Any,
    input_ids: torch.Tensor,
    pixels: Mapping[str, torch.Tensor],
    pruning: Pruning,
    asking: int,
    images: int,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, list[int]]:
    """(last hidden states ``[T', D]``, input rows kept) of one sample, ``input_ids`` ``[T]``."""
    text = model.model.language_model
    assert text.config._attn_implementation == "eager"
    hidden = text.embed_tokens(input_ids[None])
    is_vision = input_ids == model.config.image_token_id
    if is_vision.any():
        features = torch.cat(list(model.model.get_image_features(**pixels).pooler_output))
        hidden = hidden.masked_scatter(is_vision[None, :, None], features.to(hidden.dtype))
    rows = list(range(len(input_ids)))
    depths = pruning.depths(len(text.layers))
    before: tuple[Any, ...] = ()
    for number, layer in enumerate(text.layers):
        if number in depths:
            have = [row for row in rows if is_vision[row]]
            stay = min(len(have), pruning.kept(int(is_vision.sum()), images, depths[number]))
            if stay < len(have):
                free = [bool(one) and row != asking for row, one in enumerate(is_vision)]  # what asks stays
                may_go = [row for row in rows if free[row]]
                seen = look(before, hidden[0].detach(), rows, free, asking, generator)
                count = stay - (len(have) - len(may_go))
                chosen = {may_go[place] for place in CHOICES[pruning.operator](seen, count)} if count else set()
                places = [place for place, row in enumerate(rows) if not free[row] or row in chosen]
                rows = [rows[place] for place in places]
                hidden = hidden[:, places]
        positions = torch.tensor([rows])
        rotary = text.rotary_emb(hidden, positions)
        causal = torch.full((len(rows), len(rows)), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)[
            None, None
        ]
        before = (layer, hidden, rotary, causal)
        hidden = layer(hidden, attention_mask=causal, position_embeddings=rotary, position_ids=positions)
    return text.norm(hidden)[0], rows


@torch.no_grad()
def look(
    before: tuple[Any, ...],
    states: torch.Tensor,
    rows: list[int],
    vision: list[bool],
    asking: int,
    generator: torch.Generator | None,
) -> Ranked:
    """What ``before`` (layer, its input, rotary embedding, mask) shows: its own attention map, and the keys its cache would hold."""
    from transformers import DynamicCache

    layer, entered, rotary, causal = before
    cache = DynamicCache()
    normed = layer.input_layernorm(entered)
    _, maps = layer.self_attn(normed, position_embeddings=rotary, attention_mask=causal, past_key_values=cache)
    keys = cache.layers[layer.self_attn.layer_idx].keys[0]
    attention = maps[0].float().mean(dim=0)[rows.index(asking)].tolist()
    norms = keys.float().abs().sum(dim=(0, 2)).tolist()
    return Ranked(rows, vision, asking, attention, norms, states, generator)


def by_attention(seen: Ranked, keep: int) -> list[int]:
    paid = [seen.attention[place] for place, row in enumerate(seen.rows) if seen.vision[row]]
    return sorted(range(len(paid)), key=lambda one: -paid[one])[:keep]


def at_random(seen: Ranked, keep: int) -> list[int]:
    return torch.randperm(sum(seen.vision[row] for row in seen.rows), generator=seen.generator)[:keep].tolist()


def unlike_the_pivots(seen: Ranked, keep: int) -> list[int]:
    """DART, one comparison at a time."""
    vision = [place for place, row in enumerate(seen.rows) if seen.vision[row]]
    text = [place for place, row in enumerate(seen.rows) if not seen.vision[row] and row <= seen.asking]
    strongest = sorted(vision, key=lambda place: -seen.norms[place])[: min(IMAGE_PIVOTS, keep)]
    pivots = strongest + sorted(text, key=lambda place: -seen.norms[place])[:TEXT_PIVOTS]
    chosen, rest = list(strongest), keep - len(strongest)
    for number, pivot in enumerate(pivots):
        share = rest // len(pivots) + (number < rest % len(pivots))
        free = [place for place in vision if place not in chosen]

        def likeness(place: int, pivot: int = pivot) -> float:
            return float(torch.cosine_similarity(seen.states[place].float(), seen.states[pivot].float(), dim=0))

        chosen += sorted(free, key=likeness)[:share]
    return [vision.index(place) for place in chosen]


CHOICES = {"fastv": by_attention, "pyramiddrop": by_attention, "random": at_random, "dart": unlike_the_pivots}
