"""What others store of a distribution, as their documentation gives it: the codings that the project's own are measured against.

- DistillKit (github.com/arcee-ai/DistillKit, README "recommended configuration" and "budget pick"): k ids bit-packed, the first
  ``exact_k`` log-probs in bfloat16, the others as a polynomial in the rank fitted by least squares; the missing mass spread evenly.
- Sparse Logit Sampling (arXiv 2503.16870): N draws with replacement, stored as unique ids and counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from teacher_cache.signal_records import TopK


@dataclass(frozen=True)
class PolynomialHead:
    """k log-probs: ``exact_k`` in bfloat16, then a polynomial with these powers of the rank (scaled to 0 … 1) in float32."""

    k: int
    exact_k: int
    powers: tuple[float, ...]

    def bytes_per_row(self, vocabulary: int) -> float:
        return self.k * math.ceil(math.log2(vocabulary)) / 8 + 2 * self.exact_k + 4 * len(self.powers)

    def log_probs(self, topk: TopK, vocabulary: int) -> torch.Tensor:
        """float32 ``[R, V]``, normalised: the kindest reading (missing mass spread over all other tokens)."""
        values = topk.log_probs[:, : self.k]
        exact = values[:, : self.exact_k].to(torch.bfloat16).to(torch.float32)
        rank = torch.linspace(0, 1, values.shape[1] - self.exact_k)
        terms = torch.stack([rank**power for power in self.powers], dim=1).double()
        rest = values[:, self.exact_k :].double()
        coefficients = torch.linalg.lstsq(terms.expand(len(rest), -1, -1), rest[..., None], driver="gelsd").solution
        fitted = (terms.float() @ coefficients.float())[..., 0]
        kept = torch.cat([exact, fitted], dim=1)
        missing = (1 - kept.exp().sum(dim=1)).div(vocabulary - values.shape[1]).clamp_min(1e-8)
        dense = missing.log()[:, None].repeat(1, vocabulary)
        return torch.log_softmax(dense.scatter_(1, topk.ids[:, : self.k], kept), dim=1)


RECOMMENDED = PolynomialHead(128, 16, (0, 1, 2, 3, 4, 0.5))
BUDGET = PolynomialHead(50, 1, (0, 1, 0.5))


def sampled_probs(log_probs: torch.Tensor, draws: int, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    """(estimate ``[R, V]`` of the distribution from N draws, mean number of unique ids a row)."""
    drawn = torch.multinomial(log_probs.exp(), draws, replacement=True, generator=generator)
    counts = torch.zeros_like(log_probs).scatter_add_(1, drawn, torch.full(drawn.shape, 1.0 / draws))
    return counts, float((counts > 0).sum(dim=1).float().mean())


def sampled_bytes(unique: float, vocabulary: int, draws: int) -> float:
    """Ids and counts bit-packed (17 + 7 bits at V = 131,072 and N = 50 in the paper: 3 bytes an entry)."""
    return unique * (math.ceil(math.log2(vocabulary)) + math.ceil(math.log2(draws + 1))) / 8
