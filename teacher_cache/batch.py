"""Prepared rows → one right-padded batch, with flat positions of the rows that matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from teacher_cache.records import Prepared

KINDS = ("vision", "response", "text", "answer")
"""Rows at the vision tokens; those that predict a response token (shifted); at every text token; at the response tokens themselves."""


@dataclass(frozen=True)
class Batch:
    """Padded to the longest row.

    Attributes:
        inputs: keyword arguments of ``model.model``: ``input_ids``, ``attention_mask`` int64 ``[B, T]`` and pixels.
        rows: by kind, int64 positions into the flattened ``[B·T]`` hidden states, sample after sample.
        counts: by kind, how many of them belong to each sample.
        labels: int64, aligned with ``rows["response"]``.
    """

    keys: tuple[str, ...]
    inputs: Mapping[str, torch.Tensor]
    rows: Mapping[str, torch.Tensor]
    counts: Mapping[str, tuple[int, ...]]
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        def move(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        return Batch(
            self.keys, move(self.inputs), move(self.rows), self.counts, self.labels.to(device, non_blocking=True)
        )


def collate(prepared: Sequence[Prepared], pad_id: int) -> Batch:
    """Right-pad a few prepared rows; padding never enters ``rows``, and causal attention keeps it out of theirs."""
    length = max(len(one) for one in prepared)
    input_ids = torch.full((len(prepared), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for i, one in enumerate(prepared):
        input_ids[i, : len(one)] = one.input_ids
        attention_mask[i, : len(one)] = 1
    positions = {
        "vision": [one.vision_positions for one in prepared],
        "response": [one.response_rows for one in prepared],
        "text": [one.text_positions for one in prepared],
        "answer": [one.response_rows + 1 for one in prepared],
    }
    return Batch(
        keys=tuple(one.key for one in prepared),
        inputs={"input_ids": input_ids, "attention_mask": attention_mask, **_join_pixels(prepared)},
        rows={kind: torch.cat([at + i * length for i, at in enumerate(positions[kind])]) for kind in KINDS},
        counts={kind: tuple(len(at) for at in positions[kind]) for kind in KINDS},
        labels=torch.cat([one.labels for one in prepared]),
    )


def _join_pixels(prepared: Sequence[Prepared]) -> dict[str, torch.Tensor]:
    """Concatenate the processors' tensors over images; views a sample lacks (anyres tiles) are zero-padded."""
    joined: dict[str, torch.Tensor] = {}
    for name in sorted({name for one in prepared for name in one.pixels}):
        tensors = [one.pixels[name] for one in prepared if name in one.pixels]
        if tensors[0].ndim == 5:
            views = max(tensor.shape[1] for tensor in tensors)
            tensors = [torch.nn.functional.pad(t, (0, 0) * 3 + (0, views - t.shape[1])) for t in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def token_batches(prepared: Sequence[Prepared], budget: int) -> list[list[int]]:
    """Indices in batches of at most ``budget`` padded tokens (one row at least), similar lengths together; deterministic."""
    order = sorted(range(len(prepared)), key=lambda i: (len(prepared[i]), i))
    batches: list[list[int]] = []
    for i in order:
        if batches and len(prepared[i]) * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
