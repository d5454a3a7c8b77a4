"""Prepared samples → one right-padded batch, with flat positions of the rows that matter; or several samples in each row of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from teacher_cache.families import token_kinds
from teacher_cache.records import Prepared

KINDS = ("vision", "response", "text", "answer")
"""Rows at the vision tokens; those that predict a response token (shifted); at every text token; at the response tokens themselves."""


@dataclass(frozen=True)
class Batch:
    """Padded to the longest row.

    Attributes:
        inputs: keyword arguments of ``model.model``: ``input_ids`` and ``attention_mask`` int64 ``[B, T]``, and pixels. Of packed samples
            ``position_ids`` ``[B, T]``, from 0 in every sample, in place of the mask: transformers keeps samples apart by them.
        rows: by kind, int64 positions into the flattened ``[B·T]`` hidden states, sample after sample.
        counts: by kind, how many of them belong to each sample.
        labels: int64, aligned with ``rows["response"]``.
        spans: of each sample, its flat start and its tokens.
    """

    keys: tuple[str, ...]
    inputs: Mapping[str, torch.Tensor]
    rows: Mapping[str, torch.Tensor]
    counts: Mapping[str, tuple[int, ...]]
    labels: torch.Tensor
    spans: tuple[tuple[int, int], ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        def move(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        return Batch(
            self.keys,
            move(self.inputs),
            move(self.rows),
            self.counts,
            self.labels.to(device, non_blocking=True),
            self.spans,
        )


@dataclass(frozen=True)
class BatchPlace:
    """Where a sample begins in a batch."""

    row: int
    offset: int = 0


def collate(prepared: Sequence[Prepared], pad_id: int, places: Sequence[BatchPlace] | None = None) -> Batch:
    """A few samples in one batch. Padding never enters ``rows``, and causal attention keeps it out of theirs.

    Args:
        places: of the samples, in the order of the flattened batch, none over another; None: a row each.
    """
    at = places or [BatchPlace(row) for row in range(len(prepared))]
    length = max(place.offset + len(one) for place, one in zip(at, prepared, strict=True))
    input_ids = torch.full((at[-1].row + 1, length), pad_id, dtype=torch.int64)
    attention_mask, position_ids = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for place, one in zip(at, prepared):
        here = place.row, slice(place.offset, place.offset + len(one))
        input_ids[here] = one.input_ids
        attention_mask[here] = 1
        position_ids[here] = torch.arange(len(one))
    apart = {"attention_mask": attention_mask} if places is None else {"position_ids": position_ids}
    starts = [place.row * length + place.offset for place in at]
    each = [row_positions(one) for one in prepared]
    return Batch(
        keys=tuple(one.key for one in prepared),
        inputs={"input_ids": input_ids, **apart, **_join_pixels(prepared, at, input_ids.shape)},
        rows={kind: torch.cat([one[kind] + start for start, one in zip(starts, each)]) for kind in KINDS},
        counts={kind: tuple(len(one[kind]) for one in each) for kind in KINDS},
        labels=torch.cat([one.labels for one in prepared]),
        spans=tuple(zip(starts, map(len, prepared))),
    )


def row_positions(one: Prepared) -> dict[str, torch.Tensor]:
    """By kind, int64 positions in the row's own sequence."""
    return {
        "vision": one.vision_positions,
        "response": one.response_rows,
        "text": one.text_positions,
        "answer": one.response_rows + 1,
    }


def _join_pixels(
    prepared: Sequence[Prepared], places: Sequence[BatchPlace], shape: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Concatenate the processors' tensors over images; views a sample lacks (anyres tiles) are zero-padded. What is a token's stands at
    the token's place, 0 where a sample has none."""
    joined: dict[str, torch.Tensor] = {}
    for name in sorted({name for one in prepared for name in one.pixels}):
        tensors = [one.pixels[name] for one in prepared if name in one.pixels]
        if name in token_kinds():
            joined[name] = torch.zeros(tuple(shape), dtype=tensors[0].dtype)
            for place, one in zip(places, prepared):
                if name in one.pixels:
                    joined[name][place.row, place.offset : place.offset + len(one)] = one.pixels[name][0]
            continue
        if (
            tensors[0].ndim >= 4
        ):  # a view's pixels or its mask; of images without views, colours, of which all have as many
            views = max(tensor.shape[1] for tensor in tensors)
            rest = (0, 0) * (tensors[0].ndim - 2)
            tensors = [torch.nn.functional.pad(t, (*rest, 0, views - t.shape[1])) for t in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def keep_vision(batch: Batch, keep: int, pad_id: int) -> Batch:
    """The batch as if every image had its first ``keep`` vision tokens only, of the equally many that each has now.

    Sequences close up and are padded again to the longest; rows and counts follow.
    """
    vision, shape = batch.rows["vision"], batch.inputs["input_ids"].shape
    images = len(batch.inputs["pixel_values"])
    per_image, rest = divmod(len(vision), images)
    if rest or not 1 <= keep <= per_image:
        raise ValueError(f"cannot keep {keep} of {len(vision)} vision tokens in {images} images")
    is_kept_row = torch.arange(len(vision), device=vision.device) % per_image < keep
    kept = batch.inputs["attention_mask"].bool().flatten()
    kept[vision[~is_kept_row]] = False
    kept_BT = kept.view(shape)
    length = int(kept_BT.sum(1).max())
    column_BT = kept_BT.cumsum(1) - 1
    sample_BT = torch.arange(shape[0], device=vision.device)[:, None].expand(shape)
    moved = (sample_BT * length + column_BT).flatten()  # old place → new place, for what is kept
    input_ids = torch.full((shape[0] * length,), pad_id, device=vision.device)
    attention_mask = torch.zeros_like(input_ids)
    input_ids[moved[kept]] = batch.inputs["input_ids"].flatten()[kept]
    attention_mask[moved[kept]] = 1
    # The row before a response token may be a vision token that is gone: it is found from the token itself, which stays.
    rows = {kind: moved[at + 1] - 1 if kind == "response" else moved[at] for kind, at in batch.rows.items()}
    rows["vision"] = moved[vision[is_kept_row]]
    joined = {"input_ids": input_ids.view(-1, length), "attention_mask": attention_mask.view(-1, length)}
    vision_counts = tuple(count // per_image * keep for count in batch.counts["vision"])
    spans = tuple((row * length, int(tokens)) for row, tokens in enumerate(kept_BT.sum(1).tolist()))
    inputs, counts = {**batch.inputs, **joined}, {**batch.counts, "vision": vision_counts}
    return replace(batch, inputs=inputs, rows=rows, counts=counts, spans=spans)


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
