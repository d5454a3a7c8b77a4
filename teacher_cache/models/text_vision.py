"""What text tokens pay vision tokens in one decoder layer, of a teacher that is cached and of a student that trains alike.

Shapes: H heads, N text tokens, R vision tokens of a sample, T tokens of its expanded sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.families import family_of
from teacher_cache.models.attention import check_attention, layer_attention
from teacher_cache.models.kind import auto_model
from teacher_cache.models.loading import naming_what_fails
from teacher_cache.preparing.batch import Batch
from teacher_cache.wants import Wants

CHUNK_BYTES = 256 << 20
"""float32 probabilities ``[H, chunk, T]`` that exist at once where no gradient is asked; the keys are made once a chunk."""


@dataclass
class LayerInput:
    """What a decoder layer was called with: hidden states ``[B, T, D]``, cos and sin ``[B or 1, T, d]``; by layer number."""

    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    positions: dict[int, Any] = field(default_factory=dict)


def decoder_layer(model: Any, number: int) -> Any:
    """A layer of the language model; errors by name where it is not there."""
    try:
        layers = family_of(model.config).language_model(model.model).layers
    except AttributeError:
        raise CompatibilityError(
            f"{type(model).__name__} has no model.language_model.layers: its attention cannot be read"
        ) from None
    if number >= len(layers):
        raise KdcliError(
            f"attention of layer {number}: the model has layers 0 … {len(layers) - 1}; set layer among them"
        )
    return layers[number]


def check_layers(wants: Wants, config: Any, trust_remote_code: bool = False) -> None:
    """What a capture would stop at after loading the weights, from the configuration alone: a layer that is not there, or whose
    attention is computed in a way that is not known here."""
    if not wants.layers:
        return
    with naming_what_fails("the teacher"), torch.device("meta"):
        model = auto_model(config).from_config(config, trust_remote_code=trust_remote_code)
    for number in wants.layers:
        layer = decoder_layer(model, number)
        if number in wants.attention:
            check_attention(layer)


@contextmanager
def layer_inputs(model: Any, numbers: Sequence[int]) -> Iterator[LayerInput]:
    """Notes what these layers are called with, the last time inside the block."""
    seen = LayerInput()
    hooks = [decoder_layer(model, n).register_forward_pre_hook(_note(seen, n), with_kwargs=True) for n in numbers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _note(seen: LayerInput, number: int) -> Any:
    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.hidden[number] = args[0] if args else kwargs["hidden_states"]
        seen.positions[number] = kwargs.get("position_embeddings")

    return hook


def text_vision_attention(
    model: Any, number: int, seen: LayerInput, batch: Batch, mean_of_heads: bool = False
) -> list[torch.Tensor]:
    """float32 ``[H, N, R]`` (``[1, N, R]``: the mean) of every sample, on the model's device; with gradient where it is on."""
    layer, length = decoder_layer(model, number), seen.hidden[number].shape[1]
    check_attention(layer)
    found = []
    for b, (text, vision) in enumerate(zip(_places(batch, "text"), _places(batch, "vision"))):
        text, vision = text - b * length, vision - b * length
        # Padding stands on the right, where no token of the sample looks.
        end = 1 + int(torch.cat([text, vision]).max()) if len(text) + len(vision) else 0
        hidden = seen.hidden[number][b : b + 1, :end]
        cos, sin = (one[b if len(one) > 1 else 0][None, :end] for one in seen.positions[number])
        found.append(_of_sample(layer, hidden, (cos, sin), text, vision, mean_of_heads))
    return found


def _places(batch: Batch, kind: str) -> Sequence[torch.Tensor]:
    return batch.rows[kind].split(list(batch.counts[kind]))


def _of_sample(
    layer: Any,
    hidden: torch.Tensor,
    positions: tuple[torch.Tensor, torch.Tensor],
    text: torch.Tensor,
    vision: torch.Tensor,
    mean_of_heads: bool,
) -> torch.Tensor:
    """Text tokens before the first vision token pay exactly 0, and are not computed."""
    heads = layer.self_attn.config.num_attention_heads
    shape = (1 if mean_of_heads else heads, len(text), len(vision))
    if not len(vision):
        return hidden.new_zeros(shape, dtype=torch.float32)
    late = text > vision.min()
    valid = torch.ones(1, hidden.shape[1], dtype=torch.bool, device=hidden.device)
    rows = max(1, CHUNK_BYTES // (4 * heads * hidden.shape[1]))
    parts = [hidden.new_zeros(shape[0], int((~late).sum()), shape[2], dtype=torch.float32)]
    for queries in text[late].split(rows):
        probs = layer_attention(layer, hidden, positions, queries[None], valid)[0, :, :, vision]
        parts.append(probs.mean(dim=0, keepdim=True) if mean_of_heads else probs)
    return torch.cat(parts, dim=1)
