"""The same pruning written down plainly: one sample, no padding, no hooks, whole attention maps, choices token by token.

The model must run eager attention (the only one that shows its probabilities).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from student_train.pruning import Pruning, operator_module
from student_train.pruning.dart import IMAGE_PIVOTS, TEXT_PIVOTS


@dataclass
class Ranked:
    """One sample at a depth. rows: input rows still there. vision: by input row. attention: of the asking rows in the layer before,
    own_attention: in the layer itself, both by place."""

    rows: list[int]
    vision: list[bool]
    asking: list[int]
    attention: list[float]
    own_attention: list[float]
    norms: list[float]
    states: torch.Tensor
    generator: torch.Generator | None


def pruned_states(
    model: Any,
    input_ids: torch.Tensor,
    pixels: Mapping[str, torch.Tensor],
    pruning: Pruning,
    asking: int | Sequence[int],
    images: int,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, list[int]]:
    """(last hidden states ``[T', D]``, input rows kept) of one sample, ``input_ids`` ``[T]``; asking: the last prompt row of each turn."""
    text, operator = model.model.language_model, operator_module(pruning.operator)
    asked = [asking] if isinstance(asking, int) else list(asking)
    asks = asked if hasattr(operator, "EVERY_TURN") else asked[:1]
    assert text.config._attn_implementation == "eager"
    hidden = text.embed_tokens(input_ids[None])
    is_vision = input_ids == model.config.image_token_id
    if is_vision.any():
        features = torch.cat(list(model.model.get_image_features(**pixels).pooler_output))
        hidden = hidden.masked_scatter(is_vision[None, :, None], features.to(hidden.dtype))
    rows = list(range(len(input_ids)))
    depths = pruning.depths(len(text.layers))
    places_of = list(rows)
    before: tuple[Any, ...] = ()

    def inputs_of(layer: Any) -> tuple[Any, ...]:
        """Layer, its input, rotary embedding, causal mask."""
        rotary = text.rotary_emb(hidden, torch.tensor([places_of]))
        causal = torch.full((len(rows), len(rows)), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)
        return layer, hidden, rotary, causal[None, None]

    for number, layer in enumerate(text.layers):
        if number in depths:
            have = [row for row in rows if is_vision[row]]
            stay = min(len(have), pruning.kept(int(is_vision.sum()), images, depths[number]))
            if stay < len(have):
                free = [bool(one) and row not in asks for row, one in enumerate(is_vision)]  # what asks stays
                may_go = [row for row in rows if free[row]]
                seen = look(before, inputs_of(layer), text.norm(hidden)[0].detach(), rows, free, asks, generator)
                count = max(0, stay - (len(have) - len(may_go)))
                chosen = {may_go[place] for place in CHOICES[pruning.operator](seen, count)} if count else set()
                places = [place for place, row in enumerate(rows) if not free[row] or row in chosen]
                rows = [rows[place] for place in places]
                hidden = hidden[:, places]
                places_of = list(range(len(rows))) if hasattr(operator, "RENUMBERS") else list(rows)
        before = inputs_of(layer)
        _, _, rotary, causal = before
        positions = torch.tensor([places_of])
        hidden = layer(hidden, attention_mask=causal, position_embeddings=rotary, position_ids=positions)
    return text.norm(hidden)[0], rows


@torch.no_grad()
def look(
    before: tuple[Any, ...],
    own: tuple[Any, ...],
    states: torch.Tensor,
    rows: list[int],
    vision: list[bool],
    asking: list[int],
    generator: torch.Generator | None,
) -> Ranked:
    """What the layer before and the layer itself show: their attention, and the keys the former's cache would hold."""
    asks = [rows.index(row) for row in asking]
    attention, norms = attended(before, asks) if before else ([], [])
    return Ranked(rows, vision, asking, attention, attended(own, asks)[0], norms, states, generator)


def attended(ranks: tuple[Any, ...], asks: list[int]) -> tuple[list[float], list[float]]:
    """(what the asking rows pay on average, L1 norms of the keys) in a layer with its input, rotary embedding and mask."""
    from transformers import DynamicCache

    layer, entered, rotary, causal = ranks
    cache = DynamicCache()
    normed = layer.input_layernorm(entered)
    _, maps = layer.self_attn(normed, position_embeddings=rotary, attention_mask=causal, past_key_values=cache)
    keys = cache.layers[layer.self_attn.layer_idx].keys[0]
    return maps[0].float().mean(dim=0)[asks].mean(dim=0).tolist(), keys.float().abs().sum(dim=(0, 2)).tolist()


def by_attention(seen: Ranked, keep: int) -> list[int]:
    return most_paid(seen, seen.attention, keep)


def by_own_attention(seen: Ranked, keep: int) -> list[int]:
    return most_paid(seen, seen.own_attention, keep)


def most_paid(seen: Ranked, attention: list[float], keep: int) -> list[int]:
    paid = [attention[place] for place, row in enumerate(seen.rows) if seen.vision[row]]
    return sorted(range(len(paid)), key=lambda one: -paid[one])[:keep]


def at_random(seen: Ranked, keep: int) -> list[int]:
    return torch.randperm(sum(seen.vision[row] for row in seen.rows), generator=seen.generator)[:keep].tolist()


def unlike_the_pivots(seen: Ranked, keep: int) -> list[int]:
    """DART, one comparison at a time."""
    vision = [place for place, row in enumerate(seen.rows) if seen.vision[row]]
    behind = seen.rows[vision[0]]
    text = [place for place, row in enumerate(seen.rows) if not seen.vision[row] and behind < row <= seen.asking[0]]
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


CHOICES = {"fastv": by_attention, "pyramiddrop": by_own_attention, "random": at_random, "dart": unlike_the_pivots}
