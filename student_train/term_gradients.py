"""What each term of a method asks of the trained weights: the norm of its gradient, and the cosine with every other term's.

A term's gradient is that of weight · term over the whole optimizer step with respect to every trained parameter, by the ordinary pass of
the step with that term alone. So it is exact, and goes where training goes: accumulation, DDP, FSDP, checkpointing, bf16. The price is as
many passes as there are terms, and their gradients side by side in memory, each process its own shards. Training itself is untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Protocol

import torch
from torch.distributed.tensor import DTensor

from student_train.dataset import TrainBatch
from student_train.distributed import Processes
from student_train.losses.terms import Terms
from student_train.step_rows import StepRows


class GradientPasses(Protocol):
    """What of a trainer it takes to run the passes of a step one by one."""

    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.AdamW
    processes: Processes

    def drawn(self, step: int, batches: Sequence[TrainBatch]) -> list[TrainBatch]: ...

    def terms_at(self, step: int) -> Terms: ...

    def rows_of(self, step: int, batches: Sequence[TrainBatch]) -> StepRows: ...

    def accumulate(
        self, step: int, batches: Sequence[TrainBatch], terms: Terms, rows: StepRows
    ) -> tuple[float, dict[str, float]]: ...


def term_gradients(trainer: GradientPasses, step: int, given: Sequence[TrainBatch]) -> dict[str, float]:
    """``gradient_norm/TERM``, and ``gradient_cosine/TERM:OTHER`` where neither is 0, before clipping. All processes call it."""
    batches, terms = trainer.drawn(step, given), trainer.terms_at(step)
    rows = trainer.rows_of(step, batches)
    found: dict[str, list[torch.Tensor | None]] = {}
    for name, term in terms.items():
        trainer.accumulate(step, batches, {name: term}, rows)
        found[name] = [_own(parameter.grad) for parameter in trainer.parameters]
        trainer.optimizer.zero_grad(set_to_none=True)
    pairs = [*((name, name) for name in found), *combinations(found, 2)]
    products = [_product(found[one], found[other]) for one, other in pairs]
    if any(isinstance(parameter, DTensor) for parameter in trainer.parameters):
        products = trainer.processes.sum(products)
    product = dict(zip(pairs, products))
    norms = {name: max(0.0, product[name, name]) ** 0.5 for name in found}
    logged = {f"gradient_norm/{name}": norm for name, norm in norms.items()}
    for one, other in combinations(found, 2):
        if norms[one] and norms[other]:
            logged[f"gradient_cosine/{one}:{other}"] = product[one, other] / (norms[one] * norms[other])
    return logged


def _own(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """What this process has of a gradient."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _product(one: Sequence[torch.Tensor | None], other: Sequence[torch.Tensor | None]) -> float:
    """Sum over parameters of their gradients' inner products."""
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(one, other) if a is not None and b is not None]
    return float(torch.stack([torch.dot(a, b).double() for a, b in pairs]).sum()) if pairs else 0.0
