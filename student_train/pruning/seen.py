"""What an operator sees of one sample when it ranks its vision tokens (no operator itself: it has no ``NAME``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Seen:
    """One sample without padding: T rows still there, N of them vision tokens, in their original order.

    Attributes:
        vision: bool ``[T]``. prompt: bool ``[T]``, rows up to the one that asks (responses are not looked at: at inference they do
            not exist yet).
        attention: float32 ``[T]``, what the asking row pays each row in the layer before, mean over heads.
        own_attention: the same in the pruned layer itself, before anything is removed; of several asking rows the mean.
        keys: ``[T, H_kv·d]`` of the layer before, after the rotary embedding.
        normed: ``[T, D]``, what enters the pruned layer, after the language model's last norm.
        generator: of random choices.
    """

    vision: torch.Tensor
    prompt: torch.Tensor
    attention: torch.Tensor | None = None
    own_attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    normed: torch.Tensor | None = None
    generator: torch.Generator | None = None

    def need(self, name: str) -> torch.Tensor:
        value = getattr(self, name)
        assert value is not None, f"the operator did not declare {name} in WANTS"
        return value


def largest(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the ``keep`` largest scores; among equals the earlier token stays."""
    return scores.argsort(descending=True, stable=True)[:keep]
