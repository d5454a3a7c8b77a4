"""The text teacher's model, optimizer and loss.

The loss is cross entropy of a wide output layer on a CPU: bfloat16 products, gradients made in the forward pass, optionally over a sample
of the columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def build_model(vocabulary: int, width: int, layers: int, context: int, seed: int) -> Any:
    """A Llama with tied embeddings in float32: logits = lm_head.weight · last_hidden_state, no bias, no scale."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, width // 64)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def build_optimizer(model: Any, rate: float) -> torch.optim.AdamW:
    """Weight decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


class _HeadLoss(torch.autograd.Function):
    """Mean cross entropy of ``states @ weight.T``; the probabilities become the gradient in place, so they exist once."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, offset: Tensor | None) -> Tensor:
        h, w = states.bfloat16(), weight.bfloat16()
        logits = h @ w.T if offset is None else torch.addmm(offset.bfloat16(), h, w.T)
        p = torch.softmax(logits, -1)  # [rows, columns] bfloat16: range enough for any log, 3 digits
        rows = torch.arange(len(targets))
        at_target = p[rows, targets]
        p[rows, targets] = at_target - 1
        ctx.save_for_backward((p @ w).float() / len(targets), (p.T @ h).float() / len(targets))
        return -at_target.float().clamp_min(1e-38).log().mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        return states * grads[0], weight * grads[0], None, None


def head_loss(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean nats a token.

    Args:
        states: [rows, D] float. weight: [V, D] float32. targets: [rows] int64.
    """
    return _HeadLoss.apply(states, weight, targets, None)


def exact_loss(states: Tensor, weight: Tensor, targets: Tensor, rows: int = 1024) -> Tensor:
    """The same in float32 without gradients, ``rows`` rows of logits at a time."""
    sums = [
        functional.cross_entropy(h.float() @ weight.T, t, reduction="sum")
        for h, t in zip(states.split(rows), targets.split(rows))
    ]
    return torch.stack(sums).sum() / len(targets)


class ColumnSampler:
    """Columns for a sampled softmax: the frequent tokens and the batch's targets always, of the others an even sample.

    A sampled column stands for ``others / sampled`` columns, so the logarithm of that is added to its logit.
    """

    def __init__(self, train: Tensor, vocabulary: int, frequent: int, sampled: int) -> None:
        counts = torch.bincount(train, minlength=vocabulary)
        order = counts.argsort(descending=True, stable=True)
        self.frequent, self.rare, self.sampled = order[:frequent], order[frequent:], sampled

    def __call__(self, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(columns [C], targets as places in ``columns`` [rows], offsets to the logits [C])."""
        vocabulary = len(self.frequent) + len(self.rare)
        offset = torch.full((vocabulary,), -torch.inf)
        drawn = self.rare[torch.randint(len(self.rare), (self.sampled,), generator=generator)]
        offset[drawn] = torch.log(torch.tensor(len(self.rare) / self.sampled))
        offset[self.frequent] = 0.0
        offset[targets] = 0.0
        columns = (offset > -torch.inf).nonzero().flatten()
        places = torch.zeros(vocabulary, dtype=torch.long)
        places[columns] = torch.arange(len(columns))
        return columns, places[targets], offset[columns]


def sampled_loss(
    states: Tensor, weight: Tensor, targets: Tensor, sampler: ColumnSampler, generator: torch.Generator
) -> Tensor:
    """Mean nats a token over a sample of columns: cheaper than ``head_loss``, nearly the same gradient."""
    columns, places, offset = sampler(targets, generator)
    return _HeadLoss.apply(states, weight[columns], places, offset)
