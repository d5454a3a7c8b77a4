"""What goes to vLLM of a prepared row, and what comes back as ``TeacherOutput``: without vLLM itself, so that it can be tested without.

vLLM expands image placeholders itself: it is given one per image, and what it made of them must be the row's own ``input_ids``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from teacher_cache.errors import CompatibilityError
from teacher_cache.preparing.batch import row_positions
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.signal_records import TopK
from teacher_cache.sources.usable_samples import decode_image
from teacher_cache.teachers.signals import Signals
from teacher_cache.wants import Wants

FIX = "use --backend transformers for it"
LEAST_TAIL = 2.0**-20
"""Of 1 − Σp in float32: a smaller one cannot be told from rounding."""
MOST_PADDING = 16
"""Entries asked for beyond k, where the head has padding rows that may stand among them."""
UNKNOWN_LOG_Z = 0.0
"""Log-probs alone do not tell log Z. It is stored as this, and a top-k field of inexact tail is never combined with a sketch."""


class FlatLogprobs(Protocol):
    """vLLM's ``prompt_logprobs`` in flat form: entries of position i are ``start_indices[i]:end_indices[i]``; of each prompt token
    its own log-prob first, then the likeliest by rank. Position 0 has none."""

    start_indices: Sequence[int]
    end_indices: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]


class Said(NamedTuple):
    """What vLLM handed out for one row, by the route ``logprobs``. last: of the token that it sampled behind the prompt."""

    prompt: FlatLogprobs
    last: FlatLogprobs


def prompt_of(one: Prepared, image_token_id: int) -> dict[str, Any]:
    """vLLM's prompt: text tokens with one placeholder an image, and the images decoded."""
    prompt: dict[str, Any] = {"prompt_token_ids": unexpanded(one, image_token_id)}
    if one.text.image_at:
        prompt["multi_modal_data"] = {"image": [decode_image(image, 1 << 62, one.upright) for image in one.images]}
    return prompt


def unexpanded(one: Prepared, image_token_id: int) -> list[int]:
    """The row's token ids with one image token where each image stands."""
    ids, pieces, before = one.text.ids.tolist(), [], 0
    for at in one.text.image_at:
        pieces += [*ids[before:at], image_token_id]
        before = at
    return pieces + ids[before:]


def check_expansion(one: Prepared, expanded: Sequence[int]) -> None:
    """CompatibilityError where vLLM read other tokens, or vision tokens elsewhere, than the row has."""
    ours = one.input_ids.tolist()
    if list(expanded) == ours:
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, expanded)) if a != b), min(len(ours), len(expanded)))
    raise CompatibilityError(
        f"row {one.key}: vLLM reads it as {len(expanded)} tokens, the model's processor as {len(ours)}, of which "
        f"{len(one.vision_positions)} are vision tokens; they differ from position {at} on: {FIX}"
    )


def outputs_of_states(
    states: Sequence[torch.Tensor],
    prepared: Sequence[Prepared],
    wants: Wants,
    signals: Signals,
    dtype: torch.dtype,
) -> list[TeacherOutput]:
    """Route ``hidden``. states: ``[T, D]`` of every row at every token, after the final norm and not normalised."""
    kinds = wants.row_kinds
    rows: dict[str, list[torch.Tensor]] = {kind: [] for kind in kinds}
    counts: dict[str, list[int]] = {kind: [] for kind in kinds}
    for one, said in zip(prepared, states):
        if len(said) != len(one):
            raise CompatibilityError(f"row {one.key}: vLLM gives {len(said)} states for {len(one)} tokens: {FIX}")
        positions = row_positions(one)
        for kind in kinds:
            rows[kind].append(said[positions[kind]].to(dtype))
            counts[kind].append(len(positions[kind]))
    joined = {kind: torch.cat(each).to(signals.head.device) for kind, each in rows.items()}
    return signals(joined, counts, prepared, wants)


def outputs_of_log_probs(
    said: Sequence[Said], prepared: Sequence[Prepared], wants: Wants, vocabulary: int
) -> list[TeacherOutput]:
    """Route ``logprobs``. vocabulary: V without the head's padding rows, whose entries are dropped."""
    outputs = []
    for one, whole in zip(prepared, said):
        positions = row_positions(one)
        topk = {kind: topk_at(whole, positions[kind], k, vocabulary, one.key) for kind, k in wants.topk.items()}
        outputs.append(TeacherOutput(topk=topk, layout=one.layout))
    return outputs


def topk_at(said: Said, rows: torch.Tensor, k: int, vocabulary: int, key: str) -> TopK:
    """``TopK`` of these rows, positions ``[R]``: the row at t is what vLLM says of the token at t + 1.

    The tail is 1 − Σp, inexact: rounded where the row is peaked, and with the mass of the head's padding rows in it.
    """
    k = min(k, vocabulary)
    after = (rows + 1).tolist()
    ids, values = zip(*(_likeliest(said, position, k, vocabulary, key) for position in after)) if after else ((), ())
    ids_RK = torch.from_numpy(np.array(ids, np.int64).reshape(len(after), k))
    log_probs = torch.from_numpy(np.array(values, np.float64).reshape(len(after), k))
    tail = (1 - log_probs.exp().sum(dim=1)).clamp_min(LEAST_TAIL).log()
    if k == vocabulary:
        tail = torch.full_like(tail, -torch.inf)
    log_z = torch.full_like(tail, UNKNOWN_LOG_Z)
    return TopK(ids_RK, log_probs.float(), tail.float(), log_z.float())


def _likeliest(said: Said, position: int, k: int, vocabulary: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids, log-probs) ``[k]`` of a position, by falling log-prob."""
    length = len(said.prompt.start_indices)
    flat, at = (said.prompt, position) if position < length else (said.last, position - length)
    # The first entry is the token that stands there; it comes again where it is among the likeliest.
    entries = slice(flat.start_indices[at] + 1, flat.end_indices[at])
    ids, values = np.array(flat.token_ids[entries]), np.array(flat.logprobs[entries])
    kept = np.flatnonzero(ids < vocabulary)[:k]
    if len(kept) < k:
        raise CompatibilityError(
            f"row {key}: vLLM gives {len(kept)} of {k} likeliest tokens, beside padding of the head: "
            f'use vllm_route = "hidden", or {FIX}'
        )
    return ids[kept], values[kept]


def refuse_wants(wants: Wants, route: str) -> None:
    """CompatibilityError naming what this route of vLLM cannot give."""
    if wants.attention or wants.features:
        raise CompatibilityError(f"vLLM gives no {'attention' if wants.attention else 'features'}: {FIX}")
    if route == "logprobs" and not wants <= Wants(topk=wants.topk):
        signals = {"hidden states": wants.hidden, "samples": wants.sampled, "Gram matrices": wants.gram}
        others = " or ".join(name for name, wanted in signals.items() if wanted)
        raise CompatibilityError(
            f'vllm_route = "logprobs" gives only top-k (--store compact), no {others}: use vllm_route = "hidden", or {FIX}'
        )
