"""Which rows of a batch stay: the operator asked sample by sample, what it looks at computed once for the batch (no ``NAME``).

Shapes: B samples, T_0 tokens of the input, T of them (padded) still there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from student_train.pruning import Pruning, operator_module
from student_train.pruning.seen import Seen
from teacher_cache.models.attention import layer_attention, layer_keys


@dataclass(frozen=True)
class RankingInput:
    """A layer that ranks. hidden: its input ``[B, T, D]``. rotary: the cos and sin that it gets."""

    layer: Any
    hidden: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class RankedTokens:
    """The tokens that are still there.

    Attributes:
        positions: int64 ``[B, T]``, their rows in the input, -1 on padding. of_vision: bool ``[B, T_0]``, vision tokens of the input.
        asking: int64 ``[B, Q]``, the input rows that rank, -1 where a sample has fewer.
    """

    positions: torch.Tensor
    of_vision: torch.Tensor
    asking: torch.Tensor

    @property
    def valid(self) -> torch.Tensor:
        return self.positions >= 0

    @property
    def vision(self) -> torch.Tensor:
        """bool ``[B, T]``"""
        return self.of_vision.gather(1, self.positions.clamp_min(0)) & self.valid

    @property
    def asks(self) -> torch.Tensor:
        """bool ``[B, Q, T]``: where the asking rows stand."""
        return (self.positions[:, None] == self.asking[:, :, None]) & self.valid[:, None]

    @property
    def free(self) -> torch.Tensor:
        """bool ``[B, T]``: vision tokens that may go. One that asks (the last before a caption without a prompt) predicts a token: it
        is one of those that stay."""
        return self.vision & ~self.asks.any(dim=1)


@dataclass(frozen=True)
class Ranking:
    """How a pruning chooses in this batch.

    Attributes:
        images: of each sample, None: runs of vision tokens. generator: of random choices. norm: the language model's last.
    """

    pruning: Pruning
    images: Sequence[int] | None
    generator: torch.Generator | None
    norm: Callable[[torch.Tensor], torch.Tensor]

    @torch.no_grad()
    def staying(
        self, multiple: float, tokens: RankedTokens, before: RankingInput | None, own: RankingInput
    ) -> torch.Tensor | None:
        """bool ``[B, T]``: the rows that stay; None where all do.

        Args:
            multiple: of the final count, as ``Pruning.depths`` says. before: the layer before the pruned one, if any. own: the pruned
                layer, and what enters it while all are there.
        """
        have, free = (one.sum(dim=1).tolist() for one in (tokens.vision, tokens.free))
        stay = self._counts(have, tokens.of_vision, multiple)
        if stay == have:
            return None
        keep = tokens.valid.clone()
        choose = operator_module(self.pruning.operator).choose
        for sample, seen in self._seen(tokens, before, own):
            if stay[sample] < have[sample]:
                rows = tokens.free[sample].nonzero()[:, 0]
                keep[sample, rows] = False
                if (count := stay[sample] - (have[sample] - free[sample])) > 0:
                    keep[sample, rows[choose(seen, count)]] = True
        return keep

    def _counts(self, have: Sequence[int], of_vision: torch.Tensor, multiple: float) -> list[int]:
        """Vision tokens of each sample that stay."""
        starts = of_vision & ~torch.nn.functional.pad(of_vision, (1, 0))[:, :-1]
        images = starts.sum(dim=1).tolist() if self.images is None else self.images
        totals = of_vision.sum(dim=1).tolist()
        return [min(now, self.pruning.kept(n, m, multiple)) for now, n, m in zip(have, totals, images, strict=True)]

    def _seen(self, tokens: RankedTokens, before: RankingInput | None, own: RankingInput) -> Iterator[tuple[int, Seen]]:
        wants = operator_module(self.pruning.operator).WANTS
        given: dict[str, torch.Tensor] = {"vision": tokens.free, "prompt": tokens.positions <= tokens.asking[:, :1]}
        if "own_attention" in wants:
            given["own_attention"] = paid(own, tokens)
        if "normed" in wants:
            given["normed"] = self.norm(own.hidden)
        if before is not None and "attention" in wants:
            given["attention"] = paid(before, tokens)
        if before is not None and "keys" in wants:
            given["keys"] = layer_keys(before.layer, before.hidden, before.rotary).transpose(1, 2).flatten(2)
        for sample, valid in enumerate(tokens.valid):
            yield sample, Seen(**{name: one[sample, valid] for name, one in given.items()}, generator=self.generator)


def paid(ranks: RankingInput, tokens: RankedTokens) -> torch.Tensor:
    """float32 ``[B, T]``: what the asking rows pay every row in a layer, mean over its heads and over them."""
    asks = tokens.asks
    there = asks.any(dim=2)  # [B, Q]
    probs = layer_attention(ranks.layer, ranks.hidden, ranks.rotary, asks.to(torch.uint8).argmax(dim=2), tokens.valid)
    by_row = probs.mean(dim=1) * there[:, :, None]
    return by_row.sum(dim=1) / there.sum(dim=1).clamp_min(1)[:, None]
