"""What a teacher says of rows, as it travels: largest log-probs, samples of its distribution, and sketches read but not restored.

Shapes: R rows, K entries a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad


@dataclass(frozen=True)
class TopK:
    """Head of a distribution at temperature 1, rows ``[R]``; log-probs are natural logs over the full (unpadded) vocabulary.

    Attributes:
        ids: int64 ``[R, K]``, by falling log-prob.
        log_probs: float32 ``[R, K]``.
        log_tail: float32 ``[R]``, log of the exact mass outside the K ids (-inf where K = V).
        log_z: float32 ``[R]``, log-sum-exp of the raw logits.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    log_tail: torch.Tensor
    log_z: torch.Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: Any) -> TopK:
        return TopK(*(column[rows] for column in vars(self).values()))

    def to(self, device: torch.device | str) -> TopK:
        return TopK(*(column.to(device) for column in vars(self).values()))

    @staticmethod
    def join(samples: Sequence[TopK]) -> TopK:
        """Rows of several samples one after the other."""
        return TopK(*(torch.cat(column) for column in zip(*(vars(one).values() for one in samples))))


@dataclass(frozen=True)
class Sampled:
    """Unbiased samples of a distribution at temperature 1, rows ``[R]``: E[Σ w_i f(i)] = Σ p_i f(i) (teachers/sampling.py).

    Attributes:
        ids: int64 ``[R, K]``, distinct in a row; 0 where there is none.
        weights: float32 ``[R, K]``, summing to 1 in a row; 0 marks padding.
        entropy: float32 ``[R]``, of the whole distribution in nats.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    entropy: torch.Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: Any) -> Sampled:
        return Sampled(*(column[rows] for column in vars(self).values()))

    def to(self, device: torch.device | str) -> Sampled:
        return Sampled(*(column.to(device) for column in vars(self).values()))

    @staticmethod
    def join(samples: Sequence[Sampled]) -> Sampled:
        """Rows of several samples one after the other, padded to the widest."""
        width = max(one.ids.shape[1] for one in samples)
        wide = [[pad(column, (0, width - column.shape[1])) for column in (one.ids, one.weights)] for one in samples]
        ids, weights = (torch.cat(column) for column in zip(*wide))
        return Sampled(ids, weights, torch.cat([one.entropy for one in samples]))


class Coded:
    """A record whose symbols are read, and whose numbers its field still has to make (``Field.restore``), best on the training device."""


@dataclass(frozen=True)
class Sketch:
    """Coarse hidden states in the head's metric, rows ``[R]`` (codecs/transform.py).

    Attributes:
        coefficients: float32 ``[R, r]``: y = Δ·K, the largest dimensions first.
        mean_logit: float32 ``[R]``, mean raw logit over the vocabulary, stored beside them.
    """

    coefficients: torch.Tensor
    mean_logit: torch.Tensor

    def __len__(self) -> int:
        return self.coefficients.shape[0]

    def __getitem__(self, rows: Any) -> Sketch:
        return Sketch(self.coefficients[rows], self.mean_logit[rows])

    def to(self, device: torch.device | str) -> Sketch:
        return Sketch(self.coefficients.to(device), self.mean_logit.to(device))

    @staticmethod
    def join(samples: Sequence[Sketch]) -> Sketch:
        """Rows of several samples one after the other."""
        return Sketch(torch.cat([one.coefficients for one in samples]), torch.cat([one.mean_logit for one in samples]))
