"""The actual student over the compared samples: its hidden states, and the way from their gradients to its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from pipelines.judge.fidelity.rows import FidelitySample, same_grids
from pipelines.judge.fidelity.terms import StudentSide, pool
from student_train.load_student import freeze_except
from student_train.student import RowForward
from teacher_cache.preparing.batch import collate, token_batches
from teacher_cache.records import Prepared

KINDS = ("response", "vision", "text")
BATCH_TOKENS = {"cpu": 512}
"""Padded tokens of one forward by kind of device: what it keeps for the gradients of every term is most of a comparison's memory."""
GPU_BATCH_TOKENS = 4096
MOST_TOKENS = {"cpu": 4096}
"""Of the samples whose whole gradients a preflight compares: each term and side takes twice a forward's time. A GPU has no limit."""
States = dict[str, torch.Tensor]
Gradient = list[torch.Tensor]


def compared_samples(prepared: Sequence[Prepared], device: torch.device) -> list[int]:
    """As many samples, evenly chosen, as have ``MOST_TOKENS`` together; at least one."""
    most, tokens = MOST_TOKENS.get(device.type), sum(map(len, prepared))
    stride = max(1, -(-tokens // most)) if most else 1
    return list(range(len(prepared)))[::stride]


class Student:
    """A student in float32, in ``eval``, with the modules of one stage to train.

    Args:
        rows: the compared samples. prepared: the same, as the student reads them. trains: module groups with gradient.
        compared: numbers of those whose whole gradients are compared; None: all.
    Attributes:
        aligned: its vision tokens are the teacher's, one by one. batches: numbers of the ``compared`` samples of every forward.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[FidelitySample],
        prepared: Sequence[Prepared],
        trains: Sequence[str],
        pad_id: int,
        compared: Sequence[int] | None = None,
    ):
        self.device = next(model.parameters()).device
        self.parameters = [parameter for _, parameter in freeze_except(model, trains)]
        self.model = RowForward(model.eval())
        self.prepared, self._pad = list(prepared), pad_id
        self._labels = [(row.teacher.text.response, one.text.response) for row, one in zip(rows, prepared)]
        self.aligned = same_grids(rows, prepared)
        self._every = token_batches(prepared, BATCH_TOKENS.get(self.device.type, GPU_BATCH_TOKENS))
        chosen = set(range(len(prepared)) if compared is None else compared)
        left = ([number for number in numbers if number in chosen] for numbers in self._every)
        self.batches = [numbers for numbers in left if numbers]
        self._head_at = next((i for i, one in enumerate(self.parameters) if one is self.model.weight), None)

    def __len__(self) -> int:
        return len(self.prepared)

    @property
    def head(self) -> torch.Tensor:
        """``[V, D]`` without gradient."""
        return self.model.head.detach()

    @property
    def cap(self) -> float | None:
        """Of its logits, as ``HeadForm`` has it."""
        return self.model.form.cap

    @property
    def trains_head(self) -> bool:
        return self._head_at is not None

    def forward(self, numbers: Sequence[int]) -> tuple[States, dict[str, list[torch.Tensor]]]:
        """Hidden states by kind of some samples together, with graph, and detached ``[R, D]`` of each."""
        batch = collate([self.prepared[i] for i in numbers], self._pad)
        states = self.model(batch.to(self.device), KINDS)
        return states, {kind: list(states[kind].detach().split(batch.counts[kind])) for kind in KINDS}

    def side(self, number: int, states: Mapping[str, torch.Tensor]) -> StudentSide:
        """Leaves of one sample, whose gradients a loss can be asked for."""
        leaves = {kind: one.detach().clone().requires_grad_() for kind, one in states.items()}
        head = self.head.requires_grad_(self.trains_head)
        layout = self.prepared[number].layout
        theirs, ours = self._labels[number]
        return StudentSide(leaves, head, layout, (theirs.to(self.device), ours.to(self.device)), self.aligned, self.cap)

    def no_gradient(self) -> Gradient:
        return [torch.zeros_like(one) for one in self.parameters]

    def pull(self, states: States, at_states: Mapping[str, torch.Tensor], into: Gradient) -> None:
        """Add to ``into`` what gradients at the hidden states ``[R, D]`` mean for the parameters; the graph is kept."""
        kinds = [kind for kind in KINDS if states[kind].requires_grad and at_states[kind].numel()]
        if not kinds:  # a frozen language model on samples without images
            return
        # As .grad each part of the gradient is added to what is there and goes, one after the other: never does it stand there as a whole.
        for parameter, total in zip(self.parameters, into):
            parameter.grad = total
        try:
            torch.autograd.backward(
                [states[kind] for kind in kinds],
                [at_states[kind] for kind in kinds],
                retain_graph=True,
                inputs=self.parameters,
            )
        finally:
            for parameter in self.parameters:
                parameter.grad = None

    def pull_head(self, at_head: torch.Tensor, into: Gradient) -> None:
        """Add a gradient ``[V, D]`` at the head, which may be the embedding too."""
        if self._head_at is not None:
            into[self._head_at] += at_head * self.model.form.scale

    @cached_property
    def rows(self) -> list[dict[str, torch.Tensor]]:
        """Hidden states ``[R, D]`` by kind of every sample, without graph."""
        found: list[dict[str, torch.Tensor]] = [{} for _ in self.prepared]
        for numbers in self._every:
            with torch.no_grad():
                _, split = self.forward(numbers)
            for place, number in enumerate(numbers):
                found[number] = {kind: split[kind][place] for kind in KINDS}
        return found

    def matched_rows(self) -> Iterator[torch.Tensor]:
        """``[N_s, D]`` of every sample: its vision rows as they are matched."""
        for one, prepared in zip(self.rows, self.prepared):
            yield pool(one["vision"], prepared.layout) if self.aligned else one["vision"]
